"""The latent policy: a transformers vision-language model that can be fed latents and scored on
them.

`make_policy` turns a video model into one, `load_policy` reads one back; a policy is saved by
`save_pretrained` like any model, with its protocol and head in ``config.json`` under the key
``foresight``, so a plain directory is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import logging

from rl.errors import PolicyError, TrajectoryError
from rl.policy import depth, packed_attention, packed_recurrence
from rl.policy.heads import HeadConfig
from rl.policy.injection import Memory
from rl.policy.layout import PackLayout, followers
from rl.policy.modules import ModulesConfig, is_new
from rl.policy.protocol import LatentProtocol, LatentTokens
from rl.policy.scores import CHUNK_LOGITS, Scores, ScoreSlots, score_slots
from rl.policy.video_tokens import InputEmbeds, SeenVideo, VideoRows
from rl.policy.vision import show_clips_once, vision_tower

if TYPE_CHECKING:
    # What every dynamically made policy class is: the mixin on a transformers model.
    _Base = PreTrainedModel
else:
    _Base = object

CONFIG_KEY = "foresight"
_CONFIG_VERSION = 1


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


def policy_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The ``foresight`` entry of a model config."""
    settings = getattr(config, CONFIG_KEY, None)
    if not isinstance(settings, dict) or not {"protocol", "tokens", "head"} <= settings.keys():
        raise PolicyError(
            f"{config.name_or_path or type(config).__name__} is no latent policy: its config.json "
            f"has no {CONFIG_KEY!r} entry. Make one with `rl.policy.make_policy`"
        )
    if settings.get("version") != _CONFIG_VERSION:
        raise PolicyError(
            f"the policy was saved in format {settings.get('version')}; this Foresight reads "
            f"{_CONFIG_VERSION}"
        )
    return settings


def new_settings(
    protocol: LatentProtocol,
    tokens: LatentTokens,
    head: HeadConfig,
    modules: ModulesConfig | None = None,
) -> dict[str, Any]:
    """The ``foresight`` entry of a new policy's config."""
    return {
        "version": _CONFIG_VERSION,
        "protocol": protocol.to_dict(),
        "tokens": {
            "start": tokens.start,
            "end": tokens.end,
            "filler": tokens.filler,
            "banned": list(tokens.banned),
        },
        "head": head.to_dict(),
        "modules": (modules or ModulesConfig()).to_dict(),
    }


def placeholder_ids(config: PretrainedConfig) -> list[int]:
    """The tokens that stand for images and videos in a prompt."""
    ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return [token for token in ids if token is not None]


def protocol_and_tokens(config: PretrainedConfig) -> tuple[LatentProtocol, LatentTokens]:
    """The protocol of a policy's config, and the ids of its tokens."""
    settings = policy_settings(config)
    tokens = {name: _tuples(ids) for name, ids in settings["tokens"].items()}
    return LatentProtocol.from_dict(settings["protocol"]), LatentTokens(**tokens)


@lru_cache
def policy_class(base: type[PreTrainedModel]) -> type[Any]:
    """The latent variant of a model class, e.g. `LatentQwen3VLForConditionalGeneration`."""
    if "pixel_values_videos" not in inspect.signature(base.forward).parameters:
        raise PolicyError(
            f"{base.__name__} takes no video: its forward has no `pixel_values_videos`. Choose a "
            "model with video input, for example Qwen3-VL, Qwen2.5-VL or Qwen3.5"
        )
    name = f"Latent{base.__name__}"
    # transformers renames parameters between files and modules by class name, for its own classes
    # only.
    config: Any = base.config_class
    renaming = get_checkpoint_conversion_mapping(
        base.__name__
    ) or get_checkpoint_conversion_mapping(config.model_type)
    if renaming is not None:
        register_checkpoint_conversion_mapping(name, renaming, overwrite=True)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LatentPolicy.forward(self, *args, **kwargs)

    # `generate` reads off the signature which inputs a model takes.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(name, (LatentPolicy, base), {"__module__": __name__, "forward": forward})


def make_policy(
    path: str | Path,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    protocol: LatentProtocol | None = None,
    head: HeadConfig | None = None,
    modules: ModulesConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Load a video model and make it a latent policy.

    The protocol's tokens are added to `processor`'s tokenizer if it lacks them (save the processor
    beside the policy), the embeddings grow only if they have no spare rows, and the tokens' rows
    start at the mean of the old ones. `kwargs` go to `from_pretrained`. Raises `PolicyError` for a
    model without video input.
    """
    protocol, head = protocol or LatentProtocol(), head or HeadConfig()
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    config = read_config(path)
    cls = policy_class(model_class(config, path))
    new = [
        t
        for t in protocol.tokens
        if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)
    ]
    tokenizer.add_tokens(new, special_tokens=True)
    tokens = protocol.resolve(tokenizer, placeholder_ids(config))
    modules = modules or ModulesConfig()
    setattr(config, CONFIG_KEY, new_settings(protocol, tokens, head, modules))
    policy = _load(cls, path, config=config, new_head=True, new=modules, **kwargs)
    if len(tokenizer) > policy.get_input_embeddings().weight.shape[0]:
        policy.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    if new:
        _start_at_mean(policy, [tokenizer.convert_tokens_to_ids(t) for t in new])
    return policy


def load_policy(path: str | Path, modules: ModulesConfig | None = None, **kwargs: Any) -> Any:
    """Load a saved policy; `kwargs` go to `from_pretrained` (`dtype` defaults to float32). It gets
    those of `modules` that it has not yet. Raises `PolicyError`.
    """
    config = read_config(path)
    settings, modules = policy_settings(config), modules or ModulesConfig()
    own = ModulesConfig.from_dict(settings.get("modules", {}))
    settings["modules"] = own.added(modules).to_dict()
    new = replace(modules, **dict.fromkeys(own.names))
    return _load(policy_class(model_class(config, path)), path, config=config, new=new, **kwargs)


def read_config(path: str | Path) -> PretrainedConfig:
    """The config of the video model in `path`; `PolicyError` if it is none.

    It is of the class the model takes: vLLM, once it has run in a process, has put classes of its
    own into `AutoConfig`, and Qwen3.5's lacks what the model reads.
    """
    config = AutoConfig.from_pretrained(path)
    own: Any = model_class(config, path).config_class
    return config if type(config) is own else own.from_pretrained(path)


def _load(
    cls: type[Any],
    path: str | Path,
    *,
    new: ModulesConfig,
    new_head: bool = False,
    **kwargs: Any,
) -> Any:
    """`from_pretrained` that insists on every weight but those of `new` modules, and with
    `new_head` the latent head's.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its report says is judged below
    try:
        policy, info = cls.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the others
            **{"dtype": torch.float32, **kwargs},
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = {
        key
        for key in info["missing_keys"]
        if not (is_new(key, new) or (new_head and key.startswith("latent_head.")))
    }
    wrong = sorted(missing | set(info["unexpected_keys"]) | {m[0] for m in info["mismatched_keys"]})
    if wrong:
        raise PolicyError(
            f"the weights in {path} are not those of its config.json: {len(wrong)} parameters are "
            f"missing, unexpected or of another shape, such as {wrong[:3]}"
        )
    for name, module in policy.named_modules():
        # transformers passes by a module whose parameters are all its parts', and has a text model
        # make its own.
        new_parts = any(key.startswith(f"{name}.") for key in info["missing_keys"])
        if new_parts and (reset := getattr(module, "reset", None)):
            reset()
    return policy


def model_class(config: PretrainedConfig, path: str | Path) -> type[PreTrainedModel]:
    """The transformers class of the vision-language model in `path`; `PolicyError` if it is
    none.
    """
    try:
        mapping: Any = AutoModelForImageTextToText._model_mapping
        return mapping[type(config)]
    except KeyError:
        raise PolicyError(
            f"{path} holds a {config.model_type!r} model, which is no vision-language model. "
            "Choose a model with video input, for example Qwen3-VL, Qwen2.5-VL or Qwen3.5"
        ) from None


@torch.no_grad()
def _start_at_mean(policy: Any, ids: list[int]) -> None:
    for embedding in (policy.get_input_embeddings(), policy.get_output_embeddings()):
        weight = embedding.weight
        weight[ids] = weight[: min(ids)].mean(0, keepdim=True).to(weight.dtype)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
