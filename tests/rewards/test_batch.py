"""Columns of batches whose rows differ within a group."""

import pytest

from rewards.batch import make_batch
from rl.errors import DataError
from rl.trajectory import Sample

SAMPLES = [Sample("a", "a.mp4", "Where?", "A", extra={"hop": 1}), Sample("b", "b.mp4", "Who?", "B")]
TEXTS = [["one", "two"], ["three"]]


def test_columns_of_samples_hold_for_all_their_completions():
    batch = make_batch(SAMPLES, TEXTS, None)
    assert batch.columns["hop"] == [1, 1, None]
    assert batch.columns["id"] == ["a", "a", "b"] and batch.columns["group_ids"] == [0, 0, 1]
    assert "trajectories" not in batch.columns and "completion_ids" not in batch.columns


def test_columns_of_single_completions_take_the_place_of_the_samples():
    batch = make_batch(SAMPLES, TEXTS, None, [[{"hop": 1, "by": "x"}, {"hop": 2}], [{"note": "y"}]])
    assert batch.columns["hop"] == [1, 2, None]
    assert batch.columns["by"] == ["x", None, None]
    assert batch.columns["note"] == [None, None, "y"]
    with pytest.raises(DataError, match=r"\['outcomes'\] have names that rewards get"):
        make_batch(SAMPLES, TEXTS, None, [[{}, {"outcomes": 1}], [{}]])
