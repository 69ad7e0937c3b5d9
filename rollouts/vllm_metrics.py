"""What vLLM counts while an engine runs, for `VLLMEngine.health`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class EngineMetrics:
    """Totals since the engine started; `logger` is given to vLLM's engine."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()
        self._cache_used = 0.0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _Logger(self)

    def read(self) -> dict[str, Any]:
        names = ("preemptions", "prompt_tokens_looked_up", "prompt_tokens_cached")
        totals = {name: self._totals[name] for name in names}
        return totals | {"kv_cache_used": self._cache_used}

    def add(self, scheduler: Any, iteration: Any) -> None:
        if scheduler is not None:
            stats = scheduler.prefix_cache_stats
            self._totals["prompt_tokens_looked_up"] += stats.queries + stats.preempted_queries
            self._totals["prompt_tokens_cached"] += stats.hits + stats.preempted_hits
            self._cache_used = scheduler.kv_cache_usage
        if iteration is not None:
            self._totals["preemptions"] += iteration.num_preempted_reqs


class _Logger(StatLoggerBase):
    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self._metrics.add(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        pass
