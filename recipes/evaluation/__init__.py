"""Evaluation: benchmarks, greedy answers, grades, intervals, tables."""
