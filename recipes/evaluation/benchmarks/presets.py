"""The benchmarks that Foresight knows by name."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from recipes.evaluation.benchmarks.base import Benchmark, Breakdown
from rl.data.frames import FrameRule
from rl.errors import RecipeError

# Ours: the benchmarks' own prompts differ from release to release.
LETTER = "Give the letter of the right option inside <answer></answer>."
TEXT = "Reason step by step, then give your final answer inside <answer></answer>."

# Future-L1's release: 32 frames, greedy, at most 2048 new tokens, first [ABCD] in <answer>. AVG is
# over all questions: the published rows are not the means of their four columns.
FUTUREBENCH = Benchmark(
    name="futurebench",
    title="FutureBench",
    format="futurebench",
    frames=FrameRule(count=32),
    max_new_tokens=2048,
    scoring="letter",
    instruction=LETTER,
    breakdowns=(
        Breakdown(
            "question_type",
            {"hop1": "1-Hop", "hop2": "2-Hop", "hop3": "3-Hop", "hop5": "Interp"},
        ),
    ),
    overall="AVG",
)

# Future-L1's release: 8 frames, at most 4096 new tokens, a judge's grades 0 to 5 for the chain of
# thought and the answer, and the mean of the two.
TWIFF_BENCH = Benchmark(
    name="twiff_bench",
    title="TwiFF-Bench",
    format="twiff_bench",
    frames=FrameRule(count=8),
    max_new_tokens=4096,
    scoring="judge",
    instruction=TEXT,
)

# Future-L1 evaluates on the following three too; its settings there are not public. Frames and
# lengths are those of FutureBench.
MVBENCH = replace(
    FUTUREBENCH,
    name="mvbench",
    title="MVBench",
    format="mvbench",
    breakdowns=(Breakdown("task"),),
)

NEXT_QA = replace(
    FUTUREBENCH,
    name="next_qa",
    title="NExT-QA",
    format="nextqa",
    # The data's own types: causal, temporal and descriptive questions of several kinds.
    breakdowns=(
        Breakdown(
            "type",
            {
                "CW": "Causal why",
                "CH": "Causal how",
                "TN": "Temporal next",
                "TC": "Temporal current",
                "TP": "Temporal previous",
                "DC": "Descriptive count",
                "DL": "Descriptive location",
                "DO": "Descriptive other",
            },
        ),
    ),
)

VIDEO_MME = replace(
    FUTUREBENCH,
    name="video_mme",
    title="Video-MME",
    format="video_mme",
    breakdowns=(
        Breakdown("duration", {"short": "Short", "medium": "Medium", "long": "Long"}),
        Breakdown("task_type"),
    ),
    overall="Overall",
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (FUTUREBENCH, TWIFF_BENCH, MVBENCH, NEXT_QA, VIDEO_MME)
}


def find_benchmark(name: str) -> Benchmark:
    """The preset of that name. Raises `RecipeError`."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = get_close_matches(name, BENCHMARKS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(f"no benchmark is called {name!r}; {hint}known: {', '.join(BENCHMARKS)}")
