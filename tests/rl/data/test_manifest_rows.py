"""`manifest_row` writes what `read_manifest` reads."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl.data.answers import clean_options
from rl.data.manifest import manifest_row, read_manifest
from rl.data.rows import OURS
from rl.errors import DataError
from rl.trajectory import Sample

texts = st.text(min_size=1, max_size=8).filter(str.strip)
plain = texts.map(str.strip)
ascending = st.sets(st.integers(0, 99), min_size=1, max_size=4).map(lambda s: tuple(sorted(s)))
names = st.text(min_size=1, max_size=5).filter(lambda name: name not in OURS)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
# Letters among the options: an answer may be the letter of one and the text of another.
choices = st.lists(plain | st.sampled_from("ABC"), min_size=2, max_size=4, unique=True).filter(
    lambda options: clean_options(options) == tuple(options)
)


@st.composite
def samples(draw: st.DrawFn, folder: Path) -> Sample:
    options = tuple(draw(st.just([]) | choices))
    images = draw(st.sampled_from([(), ("b.png", "a.png")]))
    files = tuple(str(folder / name) for name in images)
    imagine = tuple(draw(st.lists(ascending, max_size=2)))
    reasoning = st.lists(st.text(max_size=4), min_size=len(imagine) + 1, max_size=len(imagine) + 1)
    bounds = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).filter(lambda w: w[0] < w[1])
    return Sample(
        id=draw(texts),
        video=files[0] if files else str(folder / "a.mp4"),
        question=draw(texts),
        answer=draw(st.sampled_from(ascii_uppercase[: len(options)]) if options else plain),
        options=options,
        frames=draw(st.just(()) | ascending),
        imagine=imagine,
        extra=draw(st.dictionaries(names, values, max_size=2)),
        reasoning=tuple(draw(st.just([]) | reasoning)),
        window=draw(st.none() | bounds),
        pool=draw(st.sampled_from([0, 8])),
        images=files,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_row_that_was_written_is_read_as_the_same_sample(tmp_path: Path, data: Any) -> None:
    for name in ("a.mp4", "a.png", "b.png"):
        (tmp_path / name).touch()
    sample = data.draw(samples(tmp_path))
    manifest = tmp_path / "elsewhere" / "rows.jsonl"
    manifest.parent.mkdir(exist_ok=True)
    line = json.dumps(manifest_row(sample), ensure_ascii=data.draw(st.booleans()))
    manifest.write_text(line + "\n", encoding="utf-8", newline="\n")
    assert read_manifest(manifest) == [sample]


def test_a_column_with_a_name_of_ours_is_not_written() -> None:
    sample = Sample("a", "a.mp4", "What?", "up", extra={"pool": "swimming"})
    with pytest.raises(DataError, match=r"'a'.*\['pool'\] have names of Foresight's own"):
        manifest_row(sample)


@pytest.mark.parametrize(
    ("column", "value", "wanted"),
    [
        ("window", [3, 2], "a list"),
        ("window", [1], "a list"),
        ("window", [0, True], "a list"),
        ("window", 4.5, "a number"),
        ("pool", 0, "a number"),
        ("pool", True, "true or false"),
        ("images", ["a.png", 3], "a list"),
    ],
)
def test_what_is_no_window_pool_or_images_is_refused(
    tmp_path: Path, column: str, value: Any, wanted: str
) -> None:
    (tmp_path / "a.mp4").touch()
    row = {"video": "a.mp4", "question": "What?", "answer": "up", column: value}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"line 1: column '{column}' is {wanted}"):
        read_manifest(tmp_path / "rows.jsonl")
