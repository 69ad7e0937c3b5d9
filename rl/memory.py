"""How much memory an update will take, before anything is loaded.

The update is run, not modelled: the policy is built from its config on tensors without memory
(`rl.dry_run`), and a made-up batch goes through the replay, the backward pass and AdamW as in
training. So whatever the model, its attention, checkpointing, adapters or autocast do is counted as
they do it.

Counted is the device's memory in the update. What sampling takes (engines in the same process, KV
caches), what torch and CUDA load for themselves, and what the allocator loses to fragments come on
top.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import PretrainedConfig

from rl.dry_run import DryRun
from rl.errors import PolicyError, TrajectoryError
from rl.interfaces import Media
from rl.policy.adapters import with_whole_modules
from rl.policy.heads import HeadConfig
from rl.policy.loading import model_class, policy_class, read_config
from rl.policy.model import LatentPolicy
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol, LatentTokens
from rl.policy.settings import CONFIG_KEY, new_settings, placeholder_ids
from rl.policy.vision import vision_tower
from rl.scoring import Replay, collate, replay
from rl.trajectory import MediaKey, Sampling, Trajectory

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class MemorySetting:
    """One update: the model, what a micro-batch holds, and how it is trained.

    `model` is a folder with a config.json, of a policy or of a plain video model, or such a config.
    `grid` are the patches of the prompt's clip before merging (frames or frame pairs, rows,
    columns), `text_tokens` all other tokens of the prompt. Each of the `groups` prompts of a
    micro-batch has `group_size` completions of `completion_tokens`, `latents` of which are latents
    in one span. An update accumulates over `micro_batches`. `dtype` is that of the weights,
    `autocast` that of the computation if it is another. With `reference` a frozen copy of the
    policy is held, unless adapters (`peft_config`) can be switched off instead.
    """

    model: str | Path | PretrainedConfig
    grid: tuple[int, int, int]
    text_tokens: int
    group_size: int
    completion_tokens: int
    latents: int = 8
    groups: int = 1
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    gradient_checkpointing: bool = True
    peft_config: PeftConfig | None = None
    train_vision: bool = True
    reference: bool = False
    head: HeadConfig | None = None  # of a plain model (None: identity); a policy has its own
    modules: ModulesConfig | None = None  # all that there are; None: those that a policy has


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment when most are held."""

    weights: int
    reference: int
    optimizer: int
    gradients: int
    activations: int  # inputs, what the backward pass needs, and what is computed at the moment

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        unit, size, digits = ("GiB", 2**30, 1) if self.total >= 2**30 else ("MiB", 2**20, 0)
        parts = [
            f"{f.name} {getattr(self, f.name) / size:.{digits}f}" for f in dataclasses.fields(self)
        ]
        return f"{self.total / size:.{digits}f} {unit} at the peak ({', '.join(parts)})"


def estimate_memory(setting: MemorySetting) -> MemoryEstimate:
    """Peak memory of an update, in seconds and without the memory.

    Raises `PolicyError` for a model whose shapes depend on values (a mixture of experts may).
    """
    with torch.device("meta"):
        policy = random_policy(setting)
        model = trained_model(policy, setting)
    run = DryRun()
    run.materialize(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    with run.building():
        media = ExampleMedia(setting, policy.config)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # which makes its state
        optimizer.zero_grad()
    weights = run.hold([*model.parameters(), *model.buffers()])
    reference = weights if setting.reference and setting.peft_config is None else 0
    state = run.hold(
        v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
    )
    run.watch_gradients(trained)
    try:
        with run.running():
            # After the first micro-batch all gradients exist; more of them change nothing.
            for _ in range(min(setting.micro_batches, 2)):
                backward(model, policy, setting, media)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PolicyError(
            f"the memory of a {policy.config.model_type!r} model cannot be estimated: its shapes "
            f"depend on values ({error})"
        ) from error
    gradients = run.gradients_at_peak
    return MemoryEstimate(
        weights, reference, state, gradients, run.peak - weights - state - gradients
    )


def backward(model: Any, policy: LatentPolicy, setting: MemorySetting, media: ExampleMedia) -> None:
    """One micro-batch, as the trainer does it: replay, a loss of every log-prob, its gradients."""
    replayed = _replay(model, policy, setting, media)
    loss = replayed.logprobs.exp().mean()
    if replayed.latent_logprobs is not None:
        loss = loss + replayed.latent_logprobs.mean()
    loss.backward()


def _replay(
    model: Any, policy: LatentPolicy, setting: MemorySetting, media: ExampleMedia
) -> Replay:
    # A function of its own, because the trainer too drops the batch before the backward pass.
    batch = collate(example_trajectories(policy, setting), policy, media)
    autocast: Any = nullcontext()
    if setting.autocast is not None:
        autocast = torch.autocast("cpu", dtype=setting.autocast)
    with autocast:
        return replay(model, batch, policy)


# -- what is trained -------------------------------------------------------------------------------


def random_policy(setting: MemorySetting) -> Any:
    """A policy of the setting's shapes, with random weights, whose protocol allows its latents."""
    given = setting.model
    config = copy.deepcopy(given) if isinstance(given, PretrainedConfig) else read_config(given)
    settings = getattr(config, CONFIG_KEY, None) or _settings(config, setting.head or HeadConfig())
    if setting.modules is not None:
        settings = settings | {"modules": setting.modules.to_dict()}
    protocol = LatentProtocol.from_dict(settings["protocol"])
    protocol = dataclasses.replace(
        protocol,
        min_length=1,
        max_length=max(1, setting.latents),
        max_spans=1,
        noise_scale=protocol.noise_scale or 0.1,
    )
    setattr(config, CONFIG_KEY, settings | {"protocol": protocol.to_dict()})
    cls = policy_class(
        model_class(config, given if isinstance(given, str | Path) else "the config")
    )
    return cls._from_config(config, dtype=setting.dtype)


def _settings(config: PretrainedConfig, head: HeadConfig) -> dict[str, Any]:
    """What `make_policy` would write into a plain model's config; the protocol's tokens are the
    last ones that stand for no medium.
    """
    banned = placeholder_ids(config)
    ids = reversed(range(config.get_text_config().vocab_size))
    filler, end, start = itertools.islice((i for i in ids if i not in banned), 3)
    tokens = LatentTokens(start, end, filler, tuple(banned))
    return new_settings(LatentProtocol(), tokens, head)


def trained_model(policy: Any, setting: MemorySetting) -> Any:
    """The policy in training, as `LADAPOTrainer` would have it: frozen, adapted and checkpointed
    as the setting says.
    """
    policy.train()
    if not setting.train_vision:
        vision_tower(policy).requires_grad_(False)
    model = policy
    if setting.peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(policy, with_whole_modules(setting.peft_config, policy))
        if setting.gradient_checkpointing:
            policy.enable_input_require_grads()
    if setting.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return model


# -- what it is trained on -------------------------------------------------------------------------


class ExampleMedia:
    """Hands out one black clip of the setting's grid, whatever the key."""

    def __init__(self, setting: MemorySetting, config: Any) -> None:
        vision = config.vision_config
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        frames, rows, columns = setting.grid
        self._grid = [[frames, rows, columns]]
        self._pixels = torch.zeros(frames * rows * columns, width)
        self._times = {"second_per_grid_ts": [1.0]} if _in_one_piece(config) else {}

    def get(self, key: MediaKey) -> Media:
        inputs = {"pixel_values_videos": self._pixels, "video_grid_thw": torch.tensor(self._grid)}
        return Media(key, inputs | {k: torch.tensor(v) for k, v in self._times.items()}, "")


def example_trajectories(policy: LatentPolicy, setting: MemorySetting) -> list[Trajectory]:
    """The trajectories of one micro-batch, group after group. Raises `TrajectoryError` for
    completions too short for their latents.
    """
    return [
        example_trajectory(policy, setting, sample_id=f"prompt{group}")
        for group in range(setting.groups)
        for _ in range(setting.group_size)
    ]


def example_trajectory(
    policy: LatentPolicy, setting: MemorySetting, *, sample_id: str
) -> Trajectory:
    """`[prompt | start, latents, end, text]`, with one text token all over. Prompt and clip are
    those of the sample.
    """
    tokens, latents = policy.latent_tokens, setting.latents
    special = {tokens.start, tokens.end, tokens.filler, *tokens.banned}
    text = next(token for token in range(len(special) + 1) if token not in special)
    span = [tokens.start, *[tokens.filler] * latents, tokens.end] if latents else []
    if len(span) > setting.completion_tokens:
        raise TrajectoryError(
            f"{latents} latents with their markers do not fit into completions of "
            f"{setting.completion_tokens} tokens"
        )
    completion = span + [text] * (setting.completion_tokens - len(span))
    trace = policy.protocol.trace(completion, tokens)
    length, config = len(completion), policy.config
    return Trajectory(
        sample_id=sample_id,
        prompt_ids=np.array(list(_prompt(config, setting, text))),
        completion_ids=np.array(completion),
        decision=trace.slots,
        logprobs=np.zeros(length, np.float32),
        kept=np.zeros(length, np.int32),
        latents=torch.ones(latents, config.get_text_config().hidden_size, dtype=setting.dtype),
        latent_logprobs=np.zeros(latents),
        span_lengths=trace.span_lengths,
        filler=tokens.filler,
        media=(MediaKey(sample_id, (), ""),),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(max_new_tokens=length),
        seed=0,
        text="",
        replayed=_replayed(policy, setting),
    )


def _replayed(policy: LatentPolicy, setting: MemorySetting) -> np.ndarray | None:
    """All of the clip's tokens one after the other, as long as there are some."""
    config = policy.modules_config.visual_replay
    if config is None:
        return None
    frames, rows, columns = setting.grid
    video = frames * rows * columns // policy.config.vision_config.spatial_merge_size**2
    places = np.arange(setting.latents * config.tokens).reshape(-1, config.tokens)
    return np.where(places < video, places, -1)


def _prompt(config: Any, setting: MemorySetting, text: int) -> Iterator[int]:
    """Token ids of the prompt: the clip, in pieces with text between them where the family writes
    times there, and the rest of the text.
    """
    frames, rows, columns = setting.grid
    merged = rows * columns // config.vision_config.spatial_merge_size**2
    pieces = 1 if _in_one_piece(config) else frames
    for _ in range(pieces):
        yield text
        yield from [config.video_token_id] * (frames // pieces * merged)
    yield from [text] * max(1, setting.text_tokens - pieces)


def _in_one_piece(config: Any) -> bool:
    return config.model_type in ("qwen2_vl", "qwen2_5_vl")
