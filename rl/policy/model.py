"""The latent policy: a transformers vision-language model that can be fed latents and scored on
them.

`rl.policy.loading` makes one of a video model and reads one back; it is saved by `save_pretrained`
like any model, with its protocol, head and modules in ``config.json`` (`rl.policy.settings`), so a
plain directory is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rl.errors import PolicyError, TrajectoryError
from rl.policy import depth, packed_attention, packed_recurrence
from rl.policy.heads import HeadConfig
from rl.policy.injection import Memory
from rl.policy.layout import PackLayout, followers
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol, LatentTokens
from rl.policy.scores import CHUNK_LOGITS, Scores, ScoreSlots, score_slots
from rl.policy.settings import CONFIG_KEY, policy_settings, protocol_and_tokens
from rl.policy.video_tokens import InputEmbeds, SeenVideo, VideoRows
from rl.policy.vision import show_clips_once, vision_tower

if TYPE_CHECKING:
    # What every dynamically made policy class is: the mixin on a transformers model.
    _Base = PreTrainedModel
else:
    _Base = object


class LatentPolicy(_Base):
    """Mixin that gives a vision-language model latents. `policy_class` combines it with a model
    class.

    `forward` takes five more arguments, all of which act inside it, so that DDP, FSDP2 and PEFT
    wrappers see an ordinary call. `latents` [L, H] are the input embeddings at the filler tokens of
    `input_ids`, in row-major order. `slots` asks for log-probs of given choices instead of logits:
    then the result is a `Scores`, and full-vocabulary logits never exist for the whole sequence.
    `layout` says that `input_ids` [1, T] is a row of groups: completions see the prompt of their
    group and themselves. It needs `position_ids` and no mask. `clips` says which of the clips in
    `pixel_values_videos` each entry of `video_grid_thw` is, so that the vision tower sees a clip
    once however often it is shown. `video` says where a row's video tokens are, for modules that
    need them.
    """

    latent_head: nn.Module
    latent_injection: Any  # `VideoInjection`, or None
    visual_replay: Any  # `VisualReplay`, or None
    modules_config: ModulesConfig
    protocol: LatentProtocol
    latent_tokens: LatentTokens

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.protocol, self.latent_tokens = protocol_and_tokens(config)
        self.latent_head = HeadConfig(**policy_settings(config)["head"]).build(
            config.get_text_config().hidden_size
        )
        self.latent_head.apply(self._init_weights)
        self._build(ModulesConfig.from_dict(policy_settings(config).get("modules", {})))
        packed_recurrence.install(self)

    def _build(self, modules: ModulesConfig) -> None:
        """Make the latent modules, which at first change nothing or next to nothing."""
        self.modules_config = modules
        width = self.config.get_text_config().hidden_size
        for name, part in (
            ("latent_injection", modules.injection),
            ("visual_replay", modules.visual_replay),
        ):
            module = part.build(width).apply(self._init_weights) if part is not None else None
            self.register_module(name, module)
        if modules.visual_replay is not None:
            if packed_recurrence.is_recurrent(self):
                raise PolicyError(
                    f"policy.visual_replay: {type(self).__name__} has recurrent layers, which read "
                    "tokens in the order they come, so a video token cannot be shown again at its "
                    "place; leave the key out, or choose Qwen3-VL or Qwen2.5-VL"
                )
            packed_attention.install(self.config)  # which can tell what tokens attend to
        if modules.depth is not None:
            depth.install(self, modules.depth)
            for module in self.modules():
                if isinstance(module, depth.DepthGate):
                    module.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if reset := getattr(module, "reset", None):  # one of ours, behind its parts
            reset()

    def forward(
        self,
        *args: Any,
        latents: torch.Tensor | None = None,
        slots: ScoreSlots | None = None,
        layout: PackLayout | None = None,
        clips: Sequence[int] | None = None,
        video: VideoRows | None = None,
        **kwargs: Any,
    ) -> Any:
        if slots is None:
            with self._feeding(latents), self._packing(layout, clips, kwargs):
                return super().forward(*args, **kwargs)
        with (
            depth.counted_depth() as levels,
            self.input_embeds(video) if video is not None else nullcontext() as embeds,
        ):
            hidden = self.hidden_states(
                *args, latents=latents, layout=layout, clips=clips, use_cache=False, **kwargs
            ).last_hidden_state
        seen = None
        if self.latent_injection is not None and video is not None and embeds is not None:
            seen = self.see(embeds.at(video.rows), video.visible)
        scores = self.score(hidden, slots, seen)
        return replace(scores, depth=depth.second_pass_share(levels)) if levels else scores

    def score(
        self, hidden: torch.Tensor, slots: ScoreSlots, seen: SeenVideo | None = None
    ) -> Scores:
        """Log-probs, entropies and latent means at `slots`, from hidden states [B, T, H]. `seen`
        holds the videos as latents see them: of a single row of L latents.
        """
        lm_head: Any = self.get_output_embeddings()
        return score_slots(
            hidden,
            slots,
            tokens=self.latent_tokens,
            lm_head=lm_head,
            head=partial(self.latent_means, seen=seen),
            chunk=max(1, CHUNK_LOGITS // self.config.get_text_config().vocab_size),
        )

    def see(self, video: torch.Tensor, visible: torch.Tensor) -> SeenVideo | None:
        """Videos [N, V, H] as the latents of N rows see them, where `visible` (bool [N, Q or 1, V])
        says so; None for a policy whose latents do not look.
        """
        if self.latent_injection is None:
            return None
        memory: Memory = self.latent_injection.remember(video)
        return SeenVideo(memory, visible)

    def latent_means(self, hidden: torch.Tensor, seen: SeenVideo | None = None) -> torch.Tensor:
        """Means of the latents behind hidden states [N, Q, H], or [L, H] of a single row."""
        means = self.latent_head(hidden)
        if self.latent_injection is None:
            return means
        if seen is None:
            if not len(hidden):
                return means
            raise PolicyError(
                "this policy's latents look at the video of their prompt (policy.injection), and "
                "the call says nothing about it; `rl.scoring.collate` makes rows that do"
            )
        if hidden.dim() == 2:
            return means + self.latent_injection(hidden[None], *seen)[0]
        return means + self.latent_injection(hidden, *seen)

    @contextmanager
    def input_embeds(self, video: VideoRows | None = None) -> Iterator[InputEmbeds]:
        """While this lasts: what the language model is given, features of videos in their places.
        The tokens that `video` says are shown again are put in first.
        """
        found = InputEmbeds()

        def look(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            found.value = embeds = kwargs["inputs_embeds"]
            if video is not None and self.visual_replay is not None:
                flat = embeds.flatten(0, 1)
                again = self.visual_replay(flat[video.sources]).to(flat.dtype)
                flat = flat.index_put((video.replayed,), again)
                kwargs = {**kwargs, "inputs_embeds": flat.view_as(embeds)}
            return args, kwargs

        hook = self.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()

    def hidden_states(
        self,
        *args: Any,
        latents: torch.Tensor | None = None,
        layout: PackLayout | None = None,
        clips: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's output (`last_hidden_state` [B, T, H] after the final norm,
        `past_key_values`). Raises `PolicyError` for a `layout` that the model cannot follow.
        """
        with self._feeding(latents), self._packing(layout, clips, kwargs):
            return self.base_model(*args, **kwargs)

    @contextmanager
    def _packing(
        self, layout: PackLayout | None, clips: Sequence[int] | None, kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Adds what attention and recurrence need to a call's `kwargs`, and hooks the tower."""
        if layout is None:
            if clips is not None:
                raise PolicyError("`clips` are those of a row of groups; pass its `layout` too")
            yield
            return
        given = {name for name, value in kwargs.items() if value is not None}
        wrong = [f"no {name}" for name in {"position_ids"} - given]
        wrong += [name for name in ("attention_mask", "pixel_values") if name in given]
        if wrong:
            raise PolicyError(
                "a row of groups has position_ids of its own, no attention_mask (nothing is "
                f"padded) and no images, but the call has {', '.join(wrong)}; `rl.scoring.collate` "
                "makes such rows"
            )
        if clips is None and "pixel_values_videos" in given:
            clips = range(len(kwargs["video_grid_thw"]))
        packed_attention.install(self.config)
        kwargs["layout"] = layout
        tower = show_clips_once(vision_tower(self), clips) if clips else nullcontext()
        with followers() as layers, tower:
            yield
        if len(layers) < (count := self.config.get_text_config().num_hidden_layers):
            raise PolicyError(
                f"{type(self).__name__} told {len(layers)} of its {count} layers how the row is "
                "laid out; completions would see each other. This model cannot be trained here"
            )

    @contextmanager
    def _feeding(self, latents: torch.Tensor | None) -> Iterator[None]:
        if latents is None:
            yield
            return
        fed = False

        def put(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            nonlocal fed
            fed = True
            at = args[0] == self.latent_tokens.filler
            if int(at.sum()) != latents.shape[0]:
                raise TrajectoryError(
                    f"{latents.shape[0]} latents for {int(at.sum())} filler tokens; each filler "
                    "needs one latent"
                )
            return output.masked_scatter(at.unsqueeze(-1), latents.to(output.dtype))

        hook = self.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()
        if not fed:
            raise PolicyError(
                f"{type(self).__name__} never looked its input ids up; it cannot be fed latents"
            )

    def position_ids(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of a (left-padded) prompt batch [3, B, P], and each row's next position [B]."""
        mask = inputs["attention_mask"]
        if "video_grid_thw" in inputs or "image_grid_thw" in inputs:
            rope_index: Any = self.base_model.get_rope_index
            accepted = inspect.signature(rope_index).parameters
            positions, _ = rope_index(**{k: v for k, v in inputs.items() if k in accepted})
        else:
            positions = (mask.cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)
        return positions, positions.masked_fill(mask == 0, 0).amax(dim=(0, 2)) + 1

    def set_protocol(self, protocol: LatentProtocol) -> None:
        """Change budgets or noise; the tokens stay what they are in the vocabulary."""
        if protocol.tokens != self.protocol.tokens:
            raise PolicyError("the latent tokens of a policy cannot be changed after it was made")
        self.protocol = protocol
        getattr(self.config, CONFIG_KEY)["protocol"] = protocol.to_dict()
