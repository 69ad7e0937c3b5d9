"""How GPUs are shared out."""

from __future__ import annotations

import pytest

from recipes.engines import gpu_share
from rl.errors import RecipeError


@pytest.mark.parametrize(
    ("workers", "gpus", "share"),
    [
        (1, 0, 0.0),
        (4, 0, 0.0),
        (1, 1, 1.0),
        (1, 4, 1.0),  # a worker uses one
        (2, 2, 1.0),
        (2, 1, 0.5),
        (3, 2, 0.5),  # 2/3 each would leave no room for the third
        (3, 1, 0.3333),
        (7, 2, 0.25),
        (9, 4, 0.3333),
    ],
)
def test_gpu_share(workers: int, gpus: int, share: float) -> None:
    assert gpu_share(workers, gpus) == share


def test_rewards_with_gpus_leave_less() -> None:
    assert gpu_share(2, 1, 0.5) == 0.25  # half a GPU for two
    assert gpu_share(2, 2, 0.25) == 0.75  # the reward fits beside either worker
    assert gpu_share(2, 2, 1.0) == 0.5  # a GPU is the reward's own
    with pytest.raises(RecipeError, match="none is left for the rollout workers"):
        gpu_share(1, 1, 1.0)


def test_every_worker_can_be_placed() -> None:
    """In Ray's ten-thousandths: as many workers as there are fit on the GPUs, one on each whole."""
    for gpus in range(1, 9):
        for workers in range(1, 70):
            share = round(1e4 * gpu_share(workers, gpus))
            assert gpus * (10_000 // share) >= workers
