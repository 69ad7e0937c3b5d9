"""Engines that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.rollouts.vllm_engines import Engines


@pytest.fixture(scope="session")
def vllm_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Builds vLLM engines from policies, few and kept."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    engines = Engines(tmp_path_factory.mktemp("vllm_engines"))
    yield engines
    engines.close()
