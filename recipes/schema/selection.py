"""The recipe of visual-gain selection (`foresight select`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.schema.base import Count, DataSource, Positive, RecipePath, Section, Share
from recipes.schema.policy import ClipSection
from recipes.schema.rewards import RewardSection
from recipes.schema.rollouts import ANY_WORKERS, RolloutsSection
from recipes.schema.stages import RecipeBase
from rewards.registry import SERVING_OPTIONS

PROBES = Path(__file__).parents[1] / "future_l1" / "probes.jinja"


class CandidatesSection(ClipSection):
    """The rows to select from."""

    candidates: DataSource = Field(
        description="Rows to select from, which need frames to hint with (`imagine`): a file, a "
        "folder, or a data set's name on the Hub."
    )
    format: str = Field(
        default="auto", description="How they are read (`rl.data.formats`); auto: by their columns."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="Which of their columns is what, where they have other names."
    )
    limit: Count | None = Field(default=None, description="Its first so many rows; null: all.")


class ProbingSection(Section):
    """How the probes are sampled. But for n, Future-L1's settings are not public; these are those
    of its reinforcement learning.
    """

    n: Count = Field(default=8, description="Answers to a question in each probe (Future-L1).")
    temperature: Positive = Field(default=0.9, description="Of sampling.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.99, description="Of sampling: the mass of the tokens that are not cut off."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Of sampling: how many tokens are not cut off; 0: all."
    )
    max_completion_length: Count = Field(default=2048, description="Most tokens of an answer.")


class KeepSection(Section):
    """Which rows are kept. The published rule drops easy rows, those without gain and those with a
    negative one, and keeps the top 50 000 by gain; its thresholds are not public.
    """

    top: Count | None = Field(
        default=None, description="At most so many rows, by gain; null: all (Future-L1: 50000)."
    )
    min_gain: Annotated[float, Field(ge=-1.0, le=1.0)] | None = Field(
        default=None, description="Least gain of a row that is kept; null: any above 0."
    )
    drop_easy: Share | None = Field(
        default=1.0,
        description="Drop rows whose success rate without hints is at least this; null: none.",
    )


class SelectRecipe(RecipeBase):
    """Selection of rows by visual gain, after Future-L1 (`recipes.selection.rules`)."""

    HARMLESS: ClassVar[frozenset[str]] = (
        RecipeBase.HARMLESS
        | ANY_WORKERS
        | {"keep", "chunk", "max_invalid", "data.limit", "data.media_cache_gb"}
        | {"data.bad_videos", "data.decode_timeout_s"}
        | {"outcome.timeout_s", "outcome.memory_mb", "outcome.gpus"}
        | {f"outcome.options.{name}" for name in SERVING_OPTIONS}
    )

    stage: Literal["select"] = Field(description="Selects this stage.")
    data: CandidatesSection
    rollouts: RolloutsSection = Field(
        default=RolloutsSection(), description="The workers that sample."
    )
    probes: RecipePath = Field(
        default=PROBES,
        description="Jinja template with the blocks `text` and `hinted`, what the model is asked "
        "without and with hints; by default Foresight's own.",
    )
    sampling: ProbingSection = Field(
        default=ProbingSection(), description="How the probes are sampled."
    )
    outcome: RewardSection = Field(
        default=RewardSection(use="accuracy"), description="The reward that says what is right."
    )
    max_invalid: Share = Field(
        default=0.5,
        description="Stop when more of its values, over the last 4 chunks, are invalid; 1: never.",
    )
    keep: KeepSection = Field(default=KeepSection(), description="Which rows are kept.")
    chunk: Count = Field(
        default=64, description="Rows probed at once; what they gave is kept before the next."
    )
