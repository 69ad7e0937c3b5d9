"""Foresight's tests. The environment is set here, before any test module imports transformers, TRL
or Ray.
"""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",  # every model and processor is built locally
    HF_HUB_DISABLE_TELEMETRY="1",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    TRL_EXPERIMENTAL_SILENCE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",  # the suite is the same on a machine with a GPU
    OMP_NUM_THREADS="1",
)

# Before TRL or a test imports vLLM, which settles on import what it can do.
from rollouts import vllm_cpu

vllm_cpu.install()

import rl  # noqa: E402, F401 - makes torchvision importable before a test imports transformers
