"""Benchmarks as presets: what is asked, shown, graded and broken down.

The words that a policy is asked with are ours, as are the judge's; frames, lengths and the way of
scoring are the published ones where they are public (OpenGVLab/Future-L1; see each preset).
"""

from recipes.evaluation.benchmarks.base import Benchmark, Breakdown
from recipes.evaluation.benchmarks.presets import BENCHMARKS, find_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "Breakdown", "find_benchmark"]
