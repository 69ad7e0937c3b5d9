"""Sequences that grow side by side: a policy, its cache, and what its modules know of the prompts.

The one place that feeds latents one after the other. Engines sample with it, and latent
self-forcing trains through it: with gradients on, nothing it keeps is overwritten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from rl.errors import PolicyError
from rl.policy.depth import counting_only
from rl.policy.model import LatentPolicy
from rl.policy.packed_attention import install
from rl.policy.saliency import Saliency, watched
from rl.policy.settings import placeholder_ids
from rl.policy.video_tokens import SeenVideo
from rl.policy.visual_replay import choose


@dataclass
class PromptVideos:
    """The video tokens of N prompts, V at most, padded behind, and B sequences that own them."""

    columns: torch.Tensor  # int64 [N, V], where in the cache they are
    real: torch.Tensor  # bool [N, V]
    positions: torch.Tensor  # int64 [3, N, V]
    features: torch.Tensor  # [N, V, H], as they enter the language model
    seen: SeenVideo | None  # as latents see them
    owner: torch.Tensor  # int64 [B], each sequence's prompt
    free: torch.Tensor  # bool [B, V], not shown again yet

    def select(self, rows: torch.Tensor) -> PromptVideos:
        """Those of some sequences. What is large stays where it is."""
        return replace(self, owner=self.owner[rows], free=self.free[rows])

    def seen_by(self, rows: torch.Tensor | None) -> SeenVideo | None:
        """As the latents of all sequences see them, or of some `rows`."""
        if self.seen is None:
            return None
        owner = self.owner if rows is None else self.owner[rows]
        keys, values = (x[owner] for x in self.seen.memory)
        return SeenVideo(self.seen.memory._replace(keys=keys, values=values), self.seen[1][owner])


class Unroll:
    """B sequences of one policy. `hidden` [B, H] are the hidden states of their last tokens, and
    `tail` [B, n, H] of their last n when they were opened.

    With visual replay, `replayed` [B, k] says which video tokens the last step showed again. Where
    gradients are on, the policy must not checkpoint its layers: they could not keep a cache.
    """

    hidden: torch.Tensor
    replayed: torch.Tensor | None = None
    question: torch.Tensor | None = None  # float32 [B, V], see `__init__`
    _videos: PromptVideos | None = None

    def __init__(
        self,
        policy: LatentPolicy,
        inputs: dict[str, Any],
        *,
        tail: int = 1,
        look: bool = False,
        ask: bool = False,
    ) -> None:
        """Take in the prompts of `inputs`, left-padded: what the model's processor gives for B of
        them. With `look` their `videos` are kept for the caller too, and with `ask` `question` says
        how much what stands behind a video attends to its tokens.
        """
        self.policy: Any = policy
        if policy.training and policy.is_gradient_checkpointing:
            raise PolicyError(
                "the policy checkpoints its layers, which then keep no cache to go on from; turn "
                "gradient checkpointing off"
            )
        self._replays = policy.modules_config.visual_replay
        positions, self._next = policy.position_ids(inputs)
        ids, self._mask = inputs["input_ids"], inputs["attention_mask"]
        self._saliency: torch.Tensor | None = None
        cache = _differentiable_cache(policy) if torch.is_grad_enabled() else None
        is_video = torch.isin(ids, ids.new_tensor(placeholder_ids(policy.config)))
        # Behind the last token of its video: the question, and what opens the answer.
        behind = (is_video.long().flip(1).cumsum(1).flip(1) == 0) & (self._mask > 0)
        rows = behind if ask else None
        with (
            self._watching(ids[:, -1], rows) as watch,
            policy.input_embeds() as embeds,
            counting_only(self._mask > 0),
        ):
            out = policy.hidden_states(
                **inputs, position_ids=positions, past_key_values=cache, use_cache=True
            )
        self._cache = out.past_key_values
        self.tail = out.last_hidden_state[:, -tail:]
        self.hidden = self.tail[:, -1]
        if look or ask or policy.modules_config.wants_video:
            assert embeds.value is not None
            self._videos = self._find_videos(is_video, positions, embeds.value)
        if ask:
            assert watch is not None
            self.question = self._of_videos(watch.mean)

    # -- what the modules need ---------------------------------------------------------------------

    @property
    def saliency(self) -> torch.Tensor:
        """How much each sequence's last token attended to its video tokens: float32 [B, V], mean
        over layers and heads.
        """
        assert self._saliency is not None, "the last token opens no latent and is none"
        return self._of_videos(self._saliency)

    def _of_videos(self, attention: torch.Tensor) -> torch.Tensor:
        videos = self.videos
        return attention.gather(1, videos.columns[videos.owner]) * videos.real[videos.owner]

    @property
    def videos(self) -> PromptVideos:
        """The video tokens of the prompts, where the policy or the caller wants them."""
        assert self._videos is not None, "nobody asked to look at the videos"
        return self._videos

    def means(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Means [B, H] of the latents that would come next, or of those of some `rows`."""
        hidden = self.hidden if rows is None else self.hidden[rows]
        return self.policy.latent_means(hidden[:, None], self._seen(rows))[:, 0]

    def means_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Means [B, Q, H] of latents behind any hidden states [B, Q, H] of the sequences."""
        return self.policy.latent_means(hidden, self._seen())

    def _seen(self, rows: torch.Tensor | None = None) -> SeenVideo | None:
        return None if self._videos is None else self._videos.seen_by(rows)

    # -- growing -----------------------------------------------------------------------------------

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these `rows` (int64), in this order; one may come several times."""
        self._cache.reorder_cache(rows)
        self._mask, self._next = self._mask[rows], self._next[rows]
        self.hidden = self.hidden[rows]
        if self.replayed is not None:
            self.replayed = self.replayed[rows]
        if self._saliency is not None:
            self._saliency = self._saliency[rows]
        if self._videos is not None:
            self._videos = self._videos.select(rows)

    def detached(self) -> Unroll:
        """The same sequences without a way back for gradients. Each of the two grows on its own."""
        other = copy.copy(self)
        other._cache = _detached(self._cache)
        other.hidden = self.hidden.detach()
        if self._videos is not None and (seen := self._videos.seen) is not None:
            keys, values = (x.detach() for x in seen.memory)
            seen = SeenVideo(seen.memory._replace(keys=keys, values=values), seen.visible)
            other._videos = replace(self._videos, seen=seen)
        return other

    def feed(self, ids: torch.Tensor, latents: torch.Tensor) -> None:
        """One more token for each, `ids` [B], of which the fillers are the `latents` [F, H]."""
        replays = None
        if self._replays is not None:
            fed = ids == self.policy.latent_tokens.filler
            replays = ids.new_full((len(ids), self._replays.tokens), -1)
            if bool(fed.any()) and self.videos.free.shape[1]:
                chosen = choose(self.saliency, self.videos.free, self._replays.tokens)
                replays = torch.where(fed[:, None], chosen, replays)
            self.replayed, replays = (
                replays,
                replays[:, None] if bool((replays >= 0).any()) else None,
            )
        self.extend(ids[:, None], latents, replays=replays)

    def extend(
        self,
        ids: torch.Tensor,
        latents: torch.Tensor,
        *,
        real: torch.Tensor | None = None,
        replays: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """n more tokens for each, `ids` [B, n], in one pass; returns their hidden states [B, n, H].

        `real` (bool [B, n]) is False where they are padding, which is behind the others. `replays`
        [B, n, k] are the video tokens to show again before each, -1 for none.
        """
        width = ids.shape[1]
        mask = self._mask.new_ones(ids.shape) if real is None else real.to(self._mask.dtype)
        places = self._next[:, None] + torch.arange(width, device=ids.device)
        positions = places.expand(3, -1, -1)
        own: Any = slice(None)
        shown = None
        if replays is not None:
            block = replays.shape[2] + 1  # columns of a token and what is shown before it
            self._take(replays)
            there = replays >= 0
            again = replays.clamp_min(0).flatten(1)
            videos, whose = self.videos, self.videos.owner[:, None]
            shown = self.policy.visual_replay(videos.features[whose, again])
            shown = shown.unflatten(1, (width, -1))
            old = videos.positions[:, whose, again]
            ids = F.pad(ids[..., None], (block - 1, 0)).flatten(1)
            mask = torch.cat([there.to(mask.dtype), mask[..., None]], -1).flatten(1)
            positions = torch.cat(
                [old.unflatten(2, (width, block - 1)), positions[..., None]], -1
            ).flatten(2)
            own = torch.arange(block - 1, width * block, block, device=ids.device)
        self._mask = torch.cat([self._mask, mask], 1)
        with (
            self._watching(ids[:, -1]),
            _put(self.policy, shown),
            counting_only(mask > 0),
        ):
            out = self.policy.hidden_states(
                input_ids=ids,
                latents=latents,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        hidden = out.last_hidden_state[:, own]
        self.hidden = hidden[:, -1]
        self._next = self._next + width
        return hidden

    def _take(self, replays: torch.Tensor) -> None:
        """These video tokens are not free any more."""
        gone = F.one_hot((replays + 1).flatten(1), self.videos.free.shape[1] + 1).any(1)[:, 1:]
        self._videos = replace(self.videos, free=self.videos.free & ~gone)

    @contextmanager
    def _watching(
        self, last: torch.Tensor, rows: torch.Tensor | None = None
    ) -> Iterator[Saliency | None]:
        """Notes what the `last` tokens [B] of a pass attend to, where a latent may follow that is
        preceded by a replay, and what `rows` of it do.
        """
        tokens = self.policy.latent_tokens
        inside = (last == tokens.start) | (last == tokens.filler)
        replays = self._replays is not None and bool(inside.any())
        if not replays and rows is None:
            yield None
            return
        install(self.policy.config)
        with watched(rows) as found:
            yield found
        if replays:
            self._saliency = found.last

    def _find_videos(
        self, is_video: torch.Tensor, positions: torch.Tensor, embeds: torch.Tensor
    ) -> PromptVideos:
        counts = is_video.sum(1)
        # Those of each row first, in their order.
        columns = (~is_video).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
        real = torch.arange(columns.shape[1], device=columns.device) < counts[:, None]
        features = embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[-1]))
        return PromptVideos(
            columns,
            real,
            positions.gather(2, columns.expand(3, -1, -1)),
            features,
            self.policy.see(features, real[:, None]),
            torch.arange(len(columns), device=columns.device),
            real,
        )


def _put(policy: Any, shown: torch.Tensor | None) -> Any:
    """While this lasts, `shown` [B, n, k, H] stand before the tokens of a pass, which are every k +
    1st of what the language model is given.
    """
    return nullcontext() if shown is None else _putting(policy, shown)


@contextmanager
def _putting(policy: Any, shown: torch.Tensor) -> Iterator[None]:
    def put(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"].unflatten(1, (shown.shape[1], -1))
        embeds = torch.cat([shown.to(embeds.dtype), embeds[:, :, -1:]], 2).flatten(1, 2)
        return args, {**kwargs, "inputs_embeds": embeds}

    hook = policy.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _KeptStates(LinearAttentionLayer):
    """The states of a recurrent layer, never overwritten: transformers' own copies in place, which
    cuts gradients.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.record_past = True  # or single tokens take a kernel that writes to the states

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        if self.has_previous_state[state_idx]:
            whole = torch.cat([self.conv_states[state_idx], conv_states], -1)  # type: ignore[list-item]
        else:  # before a sequence the convolution sees zeros
            whole = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        self.conv_states[state_idx] = whole[..., -size:]
        self.has_previous_state[state_idx] = True
        return whole

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


def _differentiable_cache(policy: Any) -> DynamicCache:
    cache = DynamicCache(config=policy.config.get_text_config())
    cache.layers = [
        _KeptStates() if type(layer) is LinearAttentionLayer else layer for layer in cache.layers
    ]
    return cache


def _detached(cache: DynamicCache) -> DynamicCache:
    """A copy whose tensors carry no gradients."""

    def cut(value: Any, overwritten: bool) -> Any:
        if isinstance(value, dict):
            return {key: cut(part, overwritten) for key, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone() if overwritten else value.detach()

    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        for name, value in vars(layer).items():
            setattr(layer, name, cut(value, type(layer) is LinearAttentionLayer))
    return other
