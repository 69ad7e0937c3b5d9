"""Perception: the tiny model learns to see, from nothing. It stands in for the pretraining of a
real video model.

One sequence a clip holds the observed states as video and a few short texts about them, which its
world draws (see `World.ask`; those of the tiles are explained in `texts`): where a ball is, what
colour some tiles have, and, from the pooled feature of a single state fed as a latent, where a ball
is in it and where it will be one state later. The last two make a state's pooled feature something
that can be read and moved on from, which is what latents will have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from recipes.quickstart.tiles import TILES
from recipes.quickstart.worlds import Facts, Questions, Words, World
from rl.data.media import MediaProcessor
from rl.data.video import read_each
from rl.errors import CheckpointError
from rl.policy.model import LatentPolicy
from rl.scoring import media_types
from rl.trajectory import Sample
from rl.writing import write_whole

STATE_FILE = "perception.pt"


@dataclass(frozen=True)
class Perception:
    """How to pretrain. A clip is asked for `tiles` colours (in the world that has some), and
    `reads` of its states are read and moved on.
    """

    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 4e-3
    warmup: int = 40
    final_rate: float = 0.05  # of the learning rate, where the cosine ends
    tiles: int = 3
    reads: int = 2
    max_grad_norm: float = 1.0
    checkpoint_every: int = 50
    log_every: int = 10
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step `step` (from 0): linear warmup times a cosine."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        share = self.final_rate + (1.0 - self.final_rate) * cosine
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * share


class Clips:
    """All states of the training clips as the video processor gives them, and what is true of
    them.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        media: MediaProcessor,
        progress: Callable[[int, int], object],
        world: World = TILES,
    ) -> None:
        self._facts = world.facts(samples)
        frames = range(world.states * world.frames_per_state)
        parts = []
        for first in range(0, len(samples), 64):
            batch = samples[first : first + 64]
            clips = np.stack(list(read_each((s.video for s in batch), frames)))
            pixels = media.process_frames(clips, world.fps, [frames] * len(batch))[
                "pixel_values_videos"
            ]
            # Half precision halves the memory, and is finer than the 8 bits of a pixel.
            parts.append(pixels.half().view(len(batch), world.states, -1, pixels.shape[-1]))
            progress(first + len(batch), len(samples))
        self.pixels = torch.cat(parts)  # [N, STATES, patches, D]

    def __len__(self) -> int:
        return len(self.pixels)

    def facts(self, rows: torch.Tensor) -> Facts:
        """What is true of the clips `rows` [B]."""
        return {name: values[rows] for name, values in self._facts.items()}

    def states(self, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Patches [B * S * patches, D] of `states` [B, S] of the clips `rows` [B]."""
        return self.pixels[rows[:, None], states].flatten(0, 2).float()


class Layout:
    """What is the same for all clips: the ids before the questions, grids and positions.

    `prefix` is the chat prompt of a clip up to the end of its video, as SFT and RL will show it.
    """

    def __init__(self, policy: LatentPolicy, media: MediaProcessor, sample: Sample) -> None:
        clip = media.process(media.key(sample))
        prompt = torch.from_numpy(media.encode(sample, [clip]).input_ids)
        video = (prompt == policy.config.video_token_id).nonzero()
        self.prefix = prompt[: int(video[-1]) + 2]  # the token that closes the video included
        self.grid = clip.inputs["video_grid_thw"]  # [1, 3], of the observed states
        self.state_grid = torch.tensor([[1, *self.grid[0, 1:].tolist()]])
        self._positions: torch.Tensor | None = None

    def positions(self, policy: LatentPolicy, ids: torch.Tensor) -> torch.Tensor:
        """Position ids [3, B, T]: computed for the first row, the others are laid out alike."""
        if self._positions is None or self._positions.shape[-1] != ids.shape[1]:
            row = ids[:1]
            inputs = {
                "input_ids": row,
                "attention_mask": torch.ones_like(row),
                "mm_token_type_ids": media_types(row, policy.config),
                "video_grid_thw": self.grid,
            }
            self._positions = policy.position_ids(inputs)[0]
        return self._positions.expand(-1, len(ids), -1)


def forward(
    policy: Any,
    layout: Layout,
    clips: Clips,
    rows: torch.Tensor,
    questions: Questions,
    observed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers [B, A] to the questions about the clips `rows` [B], of
    which `observed` states are shown, and whether each is right.

    The pooled features are computed with gradient: what is asked of them shapes the tower.
    """
    count = len(rows)
    ids = torch.cat([layout.prefix.expand(count, -1), questions.ids], 1)
    states = questions.states
    features = policy.get_video_features(
        clips.states(rows, states), layout.state_grid.expand(states.numel(), -1)
    )
    pooled = torch.stack(features.pooler_output).mean(1)  # [B * R, H]
    shown = torch.arange(observed).expand(count, -1)
    hidden = policy.hidden_states(
        input_ids=ids,
        latents=pooled.repeat_interleave(2, dim=0),
        mm_token_type_ids=media_types(ids, policy.config),
        pixel_values_videos=clips.states(rows, shown),
        video_grid_thw=layout.grid.expand(count, -1),
        position_ids=layout.positions(policy, ids),
        use_cache=False,
    ).last_hidden_state
    logits = policy.get_output_embeddings()(hidden[:, len(layout.prefix) + questions.asked - 1])
    answers = questions.ids[:, questions.asked]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
    return loss, logits.argmax(-1) == answers


def pretrain(
    policy: LatentPolicy,
    media: MediaProcessor,
    samples: Sequence[Sample],
    folder: str | Path,
    config: Perception = Perception(),
    world: World = TILES,
) -> list[dict[str, Any]]:
    """Teach `policy` to see, and save it with its processor in `folder`.

    Every `checkpoint_every` steps the state is saved in ``folder/perception.pt``; a later call goes
    on from there and says so, or only loads what is finished. Returns the history: rows of `step`,
    `loss` and the accuracy of each task. Raises `CheckpointError` for a state of other settings,
    `VideoError` for clips that cannot be decoded.
    """
    run = _Run.start(policy, Path(folder), config)
    with Progress() as bar:
        if run.step < config.steps:
            reading = bar.add_task("reading clips", total=len(samples))
            clips = Clips(
                samples, media, lambda done, _: bar.update(reading, completed=done), world
            )
            layout = Layout(policy, media, samples[0])
            words = Words.of(media.tokenizer, policy.latent_tokens.filler, world)
            learning = bar.add_task("learning to see", total=config.steps, completed=run.step)
            policy.train()
            while run.step < config.steps:
                rows = torch.randint(0, len(clips), (config.batch_size,), generator=run.generator)
                questions = world.ask(clips.facts(rows), words, config, run.generator)
                losses, right = forward(policy, layout, clips, rows, questions, world.observed)
                run.update(losses.mean())
                if run.step % config.log_every == 0:
                    run.log(losses.detach(), right, questions.tasks)
                if run.step % config.checkpoint_every == 0 and run.step < config.steps:
                    run.save()
                bar.update(learning, completed=run.step)
            policy.eval()
            policy.save_pretrained(folder)
            media.processor.save_pretrained(folder)
            run.save()  # last: a state of all steps says that the policy is there
    return run.history


@dataclass
class _Run:
    """What a resumed pretraining needs."""

    policy: LatentPolicy
    path: Path
    config: Perception
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, policy: LatentPolicy, folder: Path, config: Perception) -> _Run:
        optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        generator = torch.Generator().manual_seed(config.seed)
        run = cls(policy, folder / STATE_FILE, config, optimizer, generator)
        if run.path.exists():
            run.load()
        return run

    def update(self, loss: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.step += 1

    def log(self, losses: torch.Tensor, right: torch.Tensor, tasks: Sequence[str]) -> None:
        row: dict[str, Any] = {"step": self.step, "loss": float(losses.mean())}
        for task in dict.fromkeys(tasks):
            columns = [i for i, name in enumerate(tasks) if name == task]
            row[task] = float(right[:, columns].float().mean())
        self.history.append(row)

    def save(self) -> None:
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
        }
        write_whole(self.path, lambda draft: torch.save(state, draft))

    def load(self) -> None:
        state = torch.load(self.path)
        if state["config"] != asdict(self.config):
            raise CheckpointError(
                f"{self.path} is of a run with other settings ({state['config']}); delete it to "
                "start anew, or choose another folder"
            )
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.history = state["step"], state["history"]
        done = self.step == self.config.steps
        print(
            f"perception: {'finished before, loaded' if done else f'resuming at step {self.step}'} "
            f"from {self.path}"
        )
