"""Sequences that grow side by side: a policy, its cache, and what its modules know of the prompts.

The one place that feeds latents one after the other. Engines sample with it, and latent
self-forcing trains through it: with gradients on, nothing it keeps is overwritten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from rl.errors import PolicyError
from rl.policy.model import LatentPolicy
from rl.policy.packed_attention import install
from rl.policy.saliency import watched
from rl.policy.settings import placeholder_ids
from rl.policy.video_tokens import SeenVideo
from rl.policy.visual_replay import choose


@dataclass
class PromptVideos:
    """The video tokens of B prompts, V at most, padded behind."""

    columns: torch.Tensor  # int64 [B, V], where in the cache they are
    real: torch.Tensor  # bool [B, V]
    positions: torch.Tensor  # int64 [3, B, V]
    features: torch.Tensor  # [B, V, H], as they enter the language model
    seen: SeenVideo | None  # as latents see them
    free: torch.Tensor  # bool [B, V], not shown again yet

    def select(self, rows: torch.Tensor) -> PromptVideos:
        seen = self.seen
        if seen is not None:
            keys, values = seen.memory
            seen = SeenVideo(
                seen.memory._replace(keys=keys[rows], values=values[rows]), seen[1][rows]
            )
        return PromptVideos(
            self.columns[rows],
            self.real[rows],
            self.positions[:, rows],
            self.features[rows],
            seen,
            self.free[rows],
        )


class Unroll:
    """B sequences of one policy. `hidden` [B, H] are the hidden states of their last tokens, and
    `tail` [B, n, H] of their last n when they were opened.

    With visual replay, `replayed` [B, k] says which video tokens the last step showed again. Where
    gradients are on, the policy must not checkpoint its layers: they could not keep a cache.
    """

    hidden: torch.Tensor
    replayed: torch.Tensor | None = None

    def __init__(
        self,
        policy: LatentPolicy,
        inputs: dict[str, Any],
        *,
        tail: int = 1,
        watch: bool = False,
    ) -> None:
        """Take in the prompts of `inputs`, left-padded: what the model's processor gives for B of
        them. `watch` notes what their last tokens attend to, for `saliency`.
        """
        self.policy: Any = policy
        if policy.training and policy.is_gradient_checkpointing:
            raise PolicyError(
                "the policy checkpoints its layers, which then keep no cache to go on from; turn "
                "gradient checkpointing off"
            )
        self._replays = policy.modules_config.visual_replay
        self._watch = watch or self._replays is not None
        if self._watch:
            install(policy.config)
        positions, self._next = policy.position_ids(inputs)
        self._mask = inputs["attention_mask"]
        self._saliency: torch.Tensor | None = None
        cache = _differentiable_cache(policy) if torch.is_grad_enabled() else None
        with self._watching(), policy.input_embeds() as embeds:
            out = policy.hidden_states(
                **inputs, position_ids=positions, past_key_values=cache, use_cache=True
            )
        self._cache = out.past_key_values
        self.tail = out.last_hidden_state[:, -tail:]
        self.hidden = self.tail[:, -1]
        assert embeds.value is not None
        self.videos = self._find_videos(inputs["input_ids"], positions, embeds.value)

    # -- what the modules need ---------------------------------------------------------------------

    @property
    def saliency(self) -> torch.Tensor:
        """How much each sequence's last token attended to its video tokens: float32 [B, V], mean
        over layers and heads.
        """
        assert self._saliency is not None, "nobody watched what the tokens attend to"
        return self._saliency.gather(1, self.videos.columns) * self.videos.real

    def means(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Means [B, H] of the latents that would come next, or of those of some `rows`."""
        if rows is None:
            return self.means_of(self.hidden[:, None])[:, 0]
        seen = None if self.videos.seen is None else self.videos.select(rows).seen
        return self.policy.latent_means(self.hidden[rows, None], seen)[:, 0]

    def means_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Means [B, Q, H] of latents behind any hidden states [B, Q, H] of the sequences."""
        return self.policy.latent_means(hidden, self.videos.seen)

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
        self.videos = self.videos.select(rows)

    def detached(self) -> Unroll:
        """The same sequences without a way back for gradients. Each of the two grows on its own."""
        other = copy.copy(self)
        other._cache = _detached(self._cache)
        other.hidden = self.hidden.detach()
        seen = self.videos.seen
        if seen is not None:
            keys, values = (x.detach() for x in seen.memory)
            seen = SeenVideo(seen.memory._replace(keys=keys, values=values), seen.visible)
        other.videos = copy.copy(self.videos)
        other.videos.seen = seen
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
            index = again[..., None].expand(-1, -1, self.videos.features.shape[-1])
            shown = self.policy.visual_replay(self.videos.features.gather(1, index))
            shown = shown.unflatten(1, (width, -1))
            old = self.videos.positions.gather(2, again.expand(3, -1, -1))
            ids = F.pad(ids[..., None], (block - 1, 0)).flatten(1)
            mask = torch.cat([there.to(mask.dtype), mask[..., None]], -1).flatten(1)
            positions = torch.cat(
                [old.unflatten(2, (width, block - 1)), positions[..., None]], -1
            ).flatten(2)
            own = torch.arange(block - 1, width * block, block, device=ids.device)
        self._mask = torch.cat([self._mask, mask], 1)
        with self._watching(), _put(self.policy, shown):
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
        self.videos.free = self.videos.free & ~gone

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Notes what the last tokens of a pass attend to, where somebody will ask."""
        if not self._watch:
            yield
            return
        with watched() as found:
            yield
        self._saliency = found.value

    def _find_videos(
        self, ids: torch.Tensor, positions: torch.Tensor, embeds: torch.Tensor
    ) -> PromptVideos:
        wanted = ids.new_tensor(placeholder_ids(self.policy.config))
        is_video = torch.isin(ids, wanted)
        counts = is_video.sum(1)
        # Those of each row first, in their order.
        columns = (~is_video).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
        real = torch.arange(columns.shape[1], device=ids.device) < counts[:, None]
        features = embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[-1]))
        return PromptVideos(
            columns,
            real,
            positions.gather(2, columns.expand(3, -1, -1)),
            features,
            self.policy.see(features, real[:, None]),
            real.clone(),
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
