from __future__ import annotations

from pathlib import Path

import pytest

from recipes.keys import reference
from rl.errors import RecipeError

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text() == reference(), "write it anew: foresight keys > docs/keys.md"


def test_keys_of_nested_and_repeated_sections() -> None:
    lines = reference(["la_dapo"]).splitlines()
    assert "| `rewards.N.use` | needed |" in "\n".join(lines)
    assert any(line.startswith("| `train.top_p` | `1.0` |") for line in lines)
    assert any(line.startswith("| `policy.head.kind` | `identity` |") for line in lines)
    assert any(line.startswith("| `train.lora` | `null` |") for line in lines)


def test_unknown_stage() -> None:
    with pytest.raises(RecipeError, match="no stage is called 'rl'; there are sft, la_dapo"):
        reference(["rl"])
