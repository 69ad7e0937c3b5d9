"""How strongly a loss pulls on the tokens of a row: norms of its gradient at what stands for video,
question, answer and latents.

Visual-enhanced depth scaling (arXiv 2604.10500) starts from a difference between the norms of
visual and of text tokens while latents are trained; its versions disagree about which are larger.
What is averaged over what is not said: the definition below is ours, and it takes no side.

The gradient is that of an update's loss with respect to the vector that stands for a token where it
enters each decoder layer; at the first these are the input embeddings, with the features of videos
and the latents in their places. Everything is attached from outside: hooks on modules that come off
again, and on tensors whose gradients backward computes anyway.

A layer normalises what enters it, so that a long vector's gradient is small for no other reason,
and features of a video are often longer than embeddings of text. The lengths of the vectors are
measured with the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from rl.errors import PolicyError
from rl.policy.layout import PackLayout
from rl.policy.model import LatentPolicy, placeholder_ids

# What tokens stand for: images and videos; all else in a prompt; what a completion says, with the
# markers of its spans; its latents.
KINDS = ("visual", "question", "answer", "latent")
_LAST = len(KINDS)  # the number of tokens that no loss can depend on


@dataclass(frozen=True)
class TokenNorms:
    """Mean L2 norms over the tokens of each of `KINDS`, where they enter each decoder layer; None
    for a kind without tokens.

    The last token of each completion is no part of them: nothing is decided behind it, so that its
    gradient is zero whatever is learned.
    """

    tokens: dict[str, int]  # over how many tokens each is a mean
    layers: dict[str, list[float] | None]  # of the gradients
    lengths: dict[str, list[float] | None]  # of the vectors themselves

    @property
    def embeddings(self) -> dict[str, float | None]:
        """Those of the gradients at the input embeddings, which are what enters the first layer."""
        return {kind: None if row is None else row[0] for kind, row in self.layers.items()}


class GradientNorms:
    """Measures the norms of all backward passes through `policy` while it is entered.

    `policy` is the `LatentPolicy` itself, inside whatever wraps it for training. Passes without
    gradient are not looked at. Gradient checkpointing, accumulation, adapters and frozen parts are
    allowed: where nothing that makes the embeddings is trained, they are told that their gradients
    are wanted, which changes no other gradient. Norms stay on the device until `take`. Raises
    `PolicyError` for a model or a row that it cannot make out.
    """

    def __init__(self, policy: LatentPolicy) -> None:
        self._policy = policy
        decoder: Any = policy.get_decoder()
        layers = getattr(decoder, "layers", None)
        if decoder is None or not isinstance(layers, nn.ModuleList):
            raise PolicyError(
                f"{type(policy).__name__}: no decoder with a list of layers was found, so "
                "gradients cannot be measured layer by layer; choose a model of the Qwen3-VL, "
                "Qwen3.5 or Qwen2.5-VL family"
            )
        self._decoder: nn.Module = decoder
        self._layers = list(layers)
        self._hooks: list[Any] = []
        self._kinds: torch.Tensor | None = None  # [1, T], of the pass that is under way
        self._entered: set[int] = set()  # the layers that it has come to
        self._reset()

    def __enter__(self) -> GradientNorms:
        model: Any = self._policy.base_model
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
            self._decoder.register_forward_pre_hook(self._embedded, with_kwargs=True),
            *(
                layer.register_forward_pre_hook(self._entering(number), with_kwargs=True)
                for number, layer in enumerate(self._layers)
            ),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> TokenNorms:
        """The norms of the passes since the last call, which are those of one update.

        Raises `PolicyError` if gradients did not reach every layer.
        """
        missed = [i for i, count in enumerate(self._passes) if count != max(self._passes)]
        if not any(self._passes) or missed:
            where = f"layer {missed[0]} of the decoder" if missed else "the decoder"
            raise PolicyError(
                f"{type(self._policy).__name__}: no gradient came to {where} in this update, so "
                "norms cannot be compared; choose a model of the Qwen3-VL, Qwen3.5 or Qwen2.5-VL "
                "family"
            )
        assert self._sums is not None and self._counts is not None
        counts = dict(zip((*KINDS, "last"), self._counts.tolist(), strict=True))
        norms, lengths = (
            {kind: row if counts[kind] else None for kind, row in zip(KINDS, rows, strict=False)}
            for rows in (self._sums / self._counts.clamp_min(1)).mT.tolist()
        )
        self._reset()
        return TokenNorms({kind: counts[kind] for kind in KINDS}, norms, lengths)

    def _reset(self) -> None:
        # float64 [2, layers, kinds and last tokens]: of the gradients' norms and of the lengths.
        self._sums: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None  # int64 [kinds and last tokens]
        self._passes = [0] * len(self._layers)  # of backward, that came to each layer

    # -- hooks, in the order in which they are called ----------------------------------------------

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kinds, self._entered = None, set()
        if not torch.is_grad_enabled():
            return
        ids, layout = kwargs.get("input_ids", args[0] if args else None), kwargs.get("layout")
        if ids is None or layout is None:
            raise PolicyError(
                "gradients are measured on rows whose layout says what is prompt and what is "
                "completion, but a pass with gradient has none; `rl.scoring.collate` makes such "
                "rows"
            )
        self._kinds = token_kinds(
            ids,
            layout,
            filler=self._policy.latent_tokens.filler,
            placeholders=placeholder_ids(self._policy.config),
        )

    def _embedded(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._kinds is None:
            return None
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is None or embeddings.requires_grad:
            return None
        return args, {**kwargs, "inputs_embeds": embeddings.detach().requires_grad_()}

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # No pass is under way in backward, where checkpointed layers run once more. A layer
            # that gives some tokens a second pass is measured at the first.
            if self._kinds is None or number in self._entered:
                return
            self._entered.add(number)
            states, kinds = args[0] if args else kwargs["hidden_states"], self._kinds
            if states.shape[:-1] != kinds.shape:
                raise PolicyError(
                    f"{type(self._policy).__name__}: a row of {kinds.shape[1]} tokens entered "
                    f"layer {number} as {list(states.shape[:-1])}, so it is not known which vector "
                    "stands for which token; measure a policy that adds no tokens of its own"
                )
            lengths = _norms(states)
            states.register_hook(
                lambda gradient: self._add(number, kinds.flatten(), _norms(gradient), lengths)
            )

        return enter

    def _end(self, *_: Any) -> None:
        self._kinds = None

    def _add(
        self, layer: int, kinds: torch.Tensor, norms: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        """Add what was found of T tokens of these kinds, all of them [T], to the sums."""
        size, device = _LAST + 1, kinds.device
        if self._sums is None or self._counts is None:
            shape = 2, len(self._layers), size
            self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
            self._counts = torch.zeros(size, dtype=torch.int64, device=device)
        self._sums[0, layer].index_add_(0, kinds, norms)
        self._sums[1, layer].index_add_(0, kinds, lengths)
        self._passes[layer] += 1
        if layer == 0:
            self._counts += torch.bincount(kinds, minlength=size)


@torch.no_grad()
def _norms(vectors: torch.Tensor) -> torch.Tensor:
    """float64 [T], of vectors [1, T, H]."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).flatten().double()


def token_kinds(
    input_ids: torch.Tensor, layout: PackLayout, *, filler: int, placeholders: Sequence[int]
) -> torch.Tensor:
    """What each token of a row [1, T] stands for: its place in `KINDS`, or their number for the
    last token of a completion.
    """
    places = torch.empty(layout.length, dtype=torch.int64)
    for group in layout.groups:
        places[group.start : group.answers] = KINDS.index("question")
        start = group.answers
        for length in group.completions:
            places[start : start + length] = KINDS.index("answer")
            start += length
            places[start - 1] = _LAST
    kinds = places.to(input_ids.device)[None]
    visual = torch.isin(input_ids, input_ids.new_tensor(placeholders))
    kinds = kinds.masked_fill(visual, KINDS.index("visual"))
    latent = (input_ids == filler) & (kinds != _LAST)
    return kinds.masked_fill(latent, KINDS.index("latent"))
