"""The names that `rl` exports."""

import pytest

import rl


@pytest.mark.parametrize("name", rl.__all__)
def test_every_public_name_is_there(name):
    assert getattr(rl, name).__name__ == name


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="telescope"):
        _ = rl.telescope
