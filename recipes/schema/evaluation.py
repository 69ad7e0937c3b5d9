"""The recipe of an evaluation (`foresight evaluate`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from recipes.schema.base import Count, DataSource, RecipePath, Section, beside_recipe
from recipes.schema.policy import ClipSection, FramesSection
from recipes.schema.rollouts import RolloutsSection
from recipes.schema.stages import RecipeBase
from rl.policy.protocol import Imagine


class BenchmarkSection(Section):
    """One benchmark, or rows of one's own. Null stands for what the benchmark itself says; rows of
    one's own are asked as they are and scored by the accuracy rule.
    """

    use: str | None = Field(
        default=None,
        description="futurebench, twiff_bench, mvbench, next_qa or video_mme; null: one's own.",
    )
    data: DataSource = Field(
        description="Its rows: a file, a folder, or a data set's name on the Hub."
    )
    name: str | None = Field(
        default=None,
        description="What its files and tables are called; null: as `use`, or as the data.",
    )
    format: str | None = Field(
        default=None, description="How rows are read; null: the benchmark's, else auto."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="Which column of the data is what, where it has other names."
    )
    video_root: RecipePath | None = Field(
        default=None, description="Folder that its video paths start from; null: data.video_root."
    )
    limit: Count | None = Field(default=None, description="Its first so many rows; null: all.")
    modes: Annotated[list[Imagine], Field(min_length=1)] | None = Field(
        default=None,
        description="Imagining left free, forced (always) or forbidden (never); null: free, of "
        "one's own rows all three, and never for a plain model.",
    )
    frames: FramesSection | None = Field(
        default=None,
        description="Frames shown of rows that list none; null: the benchmark's, else data.frames.",
    )
    max_new_tokens: Count | None = Field(
        default=None, description="Most tokens of an answer; null: the benchmark's, else 2048."
    )
    by: list[str] | None = Field(
        default=None, description="Columns to break figures down by; null: the benchmark's."
    )
    judge: dict[str, Any] | None = Field(
        default=None,
        description="Options of the judge that grades it (twiff_bench): those of the reward judge, "
        "of which base_url and model are needed.",
    )

    @field_validator("judge")
    @classmethod
    def _judge_beside_recipe(
        cls, judge: dict[str, Any] | None, info: ValidationInfo
    ) -> dict[str, Any] | None:
        paths = {k: v for k, v in (judge or {}).items() if k in ("template", "cache")}
        paths = {k: v for k, v in paths.items() if v not in (None, "auto")}
        files = {k: str(beside_recipe(Path(v), info)) for k, v in paths.items()}
        return None if judge is None else judge | files

    @property
    def called(self) -> str:
        """Its name, which its files have."""
        return self.name or self.use or Path(self.data).stem


class EvaluateRecipe(RecipeBase):
    """Greedy figures of a policy on benchmarks (`recipes.evaluation.run`).

    What decides the answers is checked by benchmark (`AnswerStore` in
    `recipes.evaluation.predictions`), so benchmarks may be added, and a judge changed, between a
    run and its resumption.
    """

    stage: Literal["evaluate"] = Field(description="Selects this stage.")
    data: ClipSection = Field(default=ClipSection(), description="How videos are shown.")
    benchmarks: Annotated[list[BenchmarkSection], Field(min_length=1)] = Field(
        description="What to evaluate on."
    )
    rollouts: RolloutsSection = Field(
        default=RolloutsSection(), description="The workers that sample."
    )

    @field_validator("benchmarks")
    @classmethod
    def _different_names(cls, benchmarks: list[BenchmarkSection]) -> list[BenchmarkSection]:
        twice = [name for name, n in Counter(b.called for b in benchmarks).items() if n > 1]
        if twice:
            raise ValueError(
                f"several are called {twice[0]!r}, as their files would be; give each a `name`"
            )
        return benchmarks
