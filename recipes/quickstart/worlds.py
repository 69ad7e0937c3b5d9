"""What the tiny checkpoint and its pretraining must know of a world: `World`. There are two,
`recipes.quickstart.tiles.TILES` and `recipes.quickstart.balls.BALLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from recipes.quickstart import texts
from rl.errors import PolicyError
from rl.trajectory import Sample

if TYPE_CHECKING:
    from recipes.quickstart.perception import Perception

Facts = Mapping[str, torch.Tensor]  # what is true of N clips: int64 tensors [N, ...]


@dataclass(frozen=True)
class Questions:
    """The packed texts of a batch of B clips: which states are pooled, and what is asked after the
    video.
    """

    ids: torch.Tensor  # int64 [B, Q]
    asked: torch.Tensor  # int64 [A], where in Q the words to be predicted stand
    tasks: tuple[str, ...]  # [A]
    states: (
        torch.Tensor
    )  # int64 [B, R], the states whose pooled features are latents, each twice in a row


@dataclass(frozen=True)
class Words:
    """Token ids of a world's words, as they stand in running text."""

    task: dict[str, int]
    kinds: dict[str, torch.Tensor]  # int64 [words of a kind], in the order of the vocabulary
    latent: int

    @classmethod
    def of(cls, tokenizer: Any, latent: int, world: World) -> Words:
        """Look `world`'s words up. Raises `PolicyError` for a tokenizer that splits one."""

        def one(word: str) -> int:
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise PolicyError(
                    f"the tokenizer splits {word!r} in {len(ids)}; use the tokenizer of "
                    "recipes.quickstart.checkpoint, which knows each word as one token"
                )
            return ids[0]

        return cls(
            task={task: one(task) for task in world.tasks},
            kinds={
                kind: torch.tensor([one(word) for word in words])
                for kind, words in world.vocabulary.items()
            },
            latent=latent,
        )


class Packer:
    """Writes the questions of a batch of `count` clips, column by column."""

    def __init__(self, count: int, words: Words) -> None:
        self.words = words
        self.latent = torch.full((count,), words.latent)
        self._count = count
        self._columns: list[torch.Tensor] = []
        self._asked: list[int] = []
        self._tasks: list[str] = []

    def add(self, task: str, given: torch.Tensor | None, answer: torch.Tensor) -> None:
        """``task given answer``, of which `answer` is to be predicted; `given` and `answer` are
        token ids [count].
        """
        self.open(task, given)
        self.go_on(task, None, answer)

    def open(self, task: str, given: torch.Tensor | None) -> None:
        """``task given``, with nothing to be predicted yet."""
        self._columns.append(torch.full((self._count,), self.words.task[task]))
        if given is not None:
            self._columns.append(given)

    def go_on(self, task: str, given: torch.Tensor | None, answer: torch.Tensor) -> None:
        """``given answer``, which belongs to the `task` that was opened last."""
        if given is not None:
            self._columns.append(given)
        self._asked.append(len(self._columns))
        self._tasks.append(task)
        self._columns.append(answer)

    def done(self, states: Sequence[torch.Tensor]) -> Questions:
        """The questions, with the `states` [count] whose features stand at the latents."""
        return Questions(
            torch.stack(self._columns, 1),
            torch.tensor(self._asked),
            tuple(self._tasks),
            torch.stack(list(states), 1),
        )


@dataclass(frozen=True)
class World:
    """A procedural world: its clips' format, its words, and what can be asked of a clip.

    `facts` reads from manifest rows what is true of their clips. `ask` draws the questions of a
    batch: (facts of B clips, words, settings, random generator) -> `Questions`.
    """

    frame_px: int  # frames are squares
    fps: int
    frames_per_state: int
    observed: int  # states shown
    states: int  # in all
    corpus: Callable[[], list[str]]  # texts with every word that must be one token
    vocabulary: Mapping[str, Sequence[str]]  # words by kind, apart from the tasks
    tasks: tuple[str, ...]
    facts: Callable[[Sequence[Sample]], Facts]
    ask: Callable[[Facts, Words, Perception, torch.Generator], Questions]
    tags: tuple[str, ...] = (texts.ANSWER_OPEN, texts.ANSWER_CLOSE)  # one token each

    @property
    def seconds(self) -> list[str]:
        """The times that Qwen3-VL writes before each state's frames."""
        return [
            f"<{(state + 0.5) * self.frames_per_state / self.fps - 0.5 / self.fps:.1f} seconds>"
            for state in range(self.states)
        ]
