"""How strongly a loss pulls on the tokens of a row: norms of its gradient at what stands for video,
question, answer and latents.

Visual-enhanced depth scaling (arXiv 2604.10500) starts from a difference between the norms of
visual and of text tokens while latents are trained; its versions disagree about which are larger.
We know no definition of theirs: the one below is ours, and it takes no side.

The gradient is that of an update's loss with respect to the vector that stands for a token where it
enters each decoder layer; at the first these are the input embeddings, with the features of videos
and the latents in their places. Everything is attached from outside: hooks on modules that come off
again, and on tensors whose gradients backward computes anyway.

A layer normalises what enters it, so that the longer a vector, the smaller its gradient tends to
be, and features of a video may be longer than embeddings of text. The lengths of the vectors are
measured with the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from rl.errors import PolicyError
from rl.policy.model import LatentPolicy
from rl.policy.settings import placeholder_ids

# What tokens stand for: images and videos; all else in a prompt; what a completion says, with the
# markers of its spans; its latents.
KINDS: tuple[str, ...] = ("visual", "question", "answer", "latent")
VISUAL, QUESTION, ANSWER, LATENT, _PADDING = range(len(KINDS) + 1)


@dataclass(frozen=True)
class TokenNorms:
    """Mean L2 norms over the tokens of each of `KINDS`, where they enter each decoder layer; None
    for a kind without tokens.
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
        self._kinds: torch.Tensor | None = None  # [B, T], of the pass that is under way
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
        counts = dict(zip(KINDS, self._counts.tolist(), strict=False))  # all but padding
        norms, lengths = (
            {kind: row if counts[kind] else None for kind, row in zip(KINDS, rows, strict=False)}
            for rows in (self._sums / self._counts.clamp_min(1)).mT.tolist()
        )
        self._reset()
        return TokenNorms(counts, norms, lengths)

    def _reset(self) -> None:
        # float64 [2, layers, kinds and padding]: of the gradients' norms and of the lengths.
        self._sums: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None  # int64 [kinds and padding]
        self._passes = [0] * len(self._layers)  # of backward, that came to each layer

    # -- hooks, in the order in which they are called ----------------------------------------------

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kinds, self._entered = None, set()
        if not torch.is_grad_enabled():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            self._kinds = token_kinds(self._policy, ids, kwargs)

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
                    f"{type(self._policy).__name__}: tokens {list(kinds.shape)} entered layer "
                    f"{number} as {list(states.shape[:-1])}, so it is not known which vector "
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
        """Add what was found of N tokens of these kinds, all of it [N], to the sums."""
        size, device = len(KINDS) + 1, kinds.device
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
    """float64 [B * T], of vectors [B, T, H]."""
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).flatten().double()


def token_kinds(
    policy: LatentPolicy, input_ids: torch.Tensor, call: Mapping[str, Any]
) -> torch.Tensor:
    """What each token of a pass [B, T] stands for: its place in `KINDS`, or their number for
    padding. `call` holds the other arguments of the pass, which is over a packed row with its
    `layout`, or fills a cache (`rl.policy.unroll`): with prompts first, then with what follows
    them. Raises `PolicyError` for another.
    """
    layout, mask = call.get("layout"), call.get("attention_mask")
    if layout is None and (mask is None or not call.get("use_cache")):
        raise PolicyError(
            "gradients are measured on rows whose layout says what is prompt and what is "
            "completion, but a pass with gradient has none; `rl.scoring.collate` makes such rows"
        )
    continues = mask is not None and mask.shape[1] > input_ids.shape[1]
    text = torch.full(input_ids.shape, ANSWER if continues else QUESTION)
    for group in () if layout is None else layout.groups:
        text[:, group.answers : group.stop] = ANSWER
    kinds = text.to(input_ids.device)
    tokens = policy.latent_tokens
    visual = torch.isin(input_ids, input_ids.new_tensor(placeholder_ids(policy.config)))
    is_latent = input_ids == tokens.filler
    if continues and policy.modules_config.visual_replay is not None and bool(is_latent.any()):
        visual = ~is_latent  # what is fed together with latents are tokens shown again before them
    kinds = kinds.masked_fill(visual, VISUAL).masked_fill(is_latent, LATENT)
    kinds = kinds.masked_fill(input_ids == tokens.start, ANSWER)  # may be fed with the prompt
    return kinds if mask is None else kinds.masked_fill(mask[:, -kinds.shape[1] :] == 0, _PADDING)
