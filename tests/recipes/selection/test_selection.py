"""Visual-gain selection: what is kept, what is asked, and whole runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoProcessor, set_seed
from typer.testing import CliRunner

from recipes.cli import app
from recipes.loading import load_any_recipe
from recipes.run_folder import RunFolder
from recipes.schema import SelectRecipe
from recipes.schema.selection import PROBES, KeepSection, ProbingSection
from recipes.selection.files import Selection
from recipes.selection.probe_log import ProbeLog, check_fingerprints
from recipes.selection.probes import ProbePrompts, Prober
from recipes.selection.rules import Probe, Probed, choose, sift
from recipes.selection.run import probe, run_selection
from rewards.registry import build_terms
from rewards.scorer import RewardSet
from rl.data.formats import read_samples
from rl.data.frames import FrameRule
from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import CheckpointError, RecipeError
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.trajectory import Sample
from rollouts.transformers_engine import TransformersEngine
from tests.tiny import tiny_processor


def row(text: tuple[int, int], hinted: tuple[int, int]) -> Probed:
    """Right and judged answers of both probes; where none is judged, four have no verdict."""
    one, two = (Probe(*probe, 0 if probe[1] else 4, 0) for probe in (text, hinted))
    return Probed(one, two)


ROWS = {
    "a": row((1, 4), (3, 4)),  # gain 1/2
    "b": row((0, 4), (2, 4)),  # gain 1/2 too, harder without hints
    "c": row((2, 4), (1, 2)),  # 0
    "d": row((3, 4), (1, 4)),  # -1/2
    "e": row((4, 4), (4, 4)),
    "f": row((0, 0), (4, 4)),
    "g": Probed(skipped="broken"),
    "h": row((1, 4), (2, 4)),  # gain 1/4
    "i": row((0, 4), (2, 4)),  # as b
}


def reasons(keep: KeepSection) -> dict[str, str]:
    return {id: verdict.reason for id, verdict in choose(ROWS, keep).items()}


def test_rows_with_the_largest_gain_are_kept() -> None:
    verdicts = choose(ROWS, KeepSection(top=2))
    assert {id: v.rank for id, v in verdicts.items() if v.rank} == {"b": 1, "i": 2, "a": 3, "h": 4}
    assert {id: v.reason for id, v in verdicts.items()} == {
        "a": "beyond top",
        "b": "kept",
        "c": "no gain",
        "d": "negative gain",
        "e": "easy",
        "f": "unjudged",
        "g": "skipped",
        "h": "beyond top",
        "i": "kept",
    }
    assert ROWS["a"].gain == 0.5 and ROWS["d"].gain == -0.5 and ROWS["f"].gain is None


def test_a_rate_over_few_verdicts_is_none() -> None:
    # A judge that is down: what the rule calls right is judged, all else is not.
    assert Probe(1, 1, 7, 0).rate is None and Probe(1, 3, 4, 0).rate is None
    assert Probe(1, 4, 4, 0).rate == Fraction(1, 4)
    down = Probed(Probe(0, 8, 0, 0), Probe(1, 1, 7, 0))
    assert down.gain is None and not down.settled and sift(down, KeepSection()) == "unjudged"
    assert Probed(skipped="broken").settled and row((0, 4), (1, 4)).settled


def test_thresholds_decide_what_may_be_kept() -> None:
    assert reasons(KeepSection())["h"] == "kept"
    assert reasons(KeepSection(min_gain=0.5))["h"] == "little gain"
    assert reasons(KeepSection(min_gain=0.5))["a"] == "kept"
    assert reasons(KeepSection(min_gain=0.0))["c"] == "kept"
    assert reasons(KeepSection(min_gain=-0.5, drop_easy=None))["d"] == "kept"
    easy = reasons(KeepSection(drop_easy=0.25))
    assert [id for id, reason in easy.items() if reason == "easy"] == ["a", "c", "d", "e", "h"]
    assert reasons(KeepSection(drop_easy=None))["e"] == "no gain"


def test_equal_gains_are_equal_and_thresholds_mean_what_is_written() -> None:
    # As floats 0.8 - 0.7 > 0.1 and 0.3 - 0.2 < 0.1.
    rows = {"x": row((7, 10), (8, 10)), "y": row((0, 10), (1, 10)), "z": row((2, 10), (3, 10))}
    verdicts = choose(rows, KeepSection(min_gain=0.1))
    assert {id: v.rank for id, v in verdicts.items()} == {"y": 1, "z": 2, "x": 3}


counts = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda c: (min(c), max(c)))


@given(st.lists(st.tuples(counts, counts), max_size=12), st.integers(1, 6), st.randoms())
def test_the_best_are_kept_whatever_the_order(pairs: Any, top: int, random: Any) -> None:
    rows = {str(i): row(*pair) for i, pair in enumerate(pairs)}
    shuffled = list(rows.items())
    random.shuffle(shuffled)
    keep = KeepSection(top=top)
    verdicts = choose(rows, keep)
    assert choose(dict(shuffled), keep) == verdicts
    gains = {reason: [] for reason in ("kept", "beyond top")}
    for id, verdict in verdicts.items():
        gains.setdefault(verdict.reason, []).append(rows[id].gain)
    assert len(gains["kept"]) <= top
    assert all(gain > 0 for gain in gains["kept"])
    if gains["beyond top"]:
        assert len(gains["kept"]) == top
        assert min(gains["kept"]) >= max(gains["beyond top"])


def ask(kind: Any, **changes: Any) -> str:
    values = {"question": "Where?", "options": [], "letters": [], "shown": 4, "hints": 2}
    return ProbePrompts(PROBES).render(kind, values | changes)


def test_our_prompts_differ_in_the_hints_alone() -> None:
    text, hinted = ask("text", hints=0), ask("hinted")
    assert text.startswith("You see 4 frames") and hinted.startswith("You see 6 frames")
    assert "hints" in hinted and "hint" not in text
    assert text.split("\n")[1:] == hinted.split("\n")[1:]
    assert text.endswith("between <answer> and </answer>.")
    assert ask("text", options=["A. up", "B. down"], letters=["A", "B"]).split("\n\n")[1:] == [
        "Where?\nA. up\nB. down",
        "Think it through in a few sentences. Then write your final answer between <answer> and "
        "</answer>: the letter of the right option, one of A, B.",
    ]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% block text %}{{ question }}{% endblock %}", "no block 'hinted'"),
        ("{% block text %}{{ answer }}{% endblock %}", r"uses \['answer'\]; it gets"),
        ("\n{% block text %}", "line 2"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, source: str, problem: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    with pytest.raises(RecipeError, match=problem):
        ProbePrompts(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        ProbePrompts(tmp_path / "none.jinja")


@pytest.fixture(scope="module")
def prober() -> Prober:
    media = MediaProcessor(tiny_processor(), FrameRule(count=3))
    settings = ProbingSection(n=2, temperature=0.7, top_k=5, max_completion_length=6)
    return Prober(ProbePrompts(PROBES), media, settings, seed=3)


@pytest.fixture(scope="module")
def samples(clips: Path) -> list[Sample]:
    return read_manifest(clips / "manifest.jsonl")


def test_hints_are_added_to_the_clip(prober: Prober, samples: list[Sample]) -> None:
    requests = prober.requests(samples[1])
    assert requests is not None
    text, hinted = requests
    assert text.sample.frames == (0, 1, 2, 3)
    assert hinted.sample.frames == (0, 1, 2, 3, 4, 5, 6, 7)
    assert "4 of them were added" in hinted.sample.question
    for request in requests:
        assert request.sample.options == () and request.sample.id == "clip1"
        assert request.sample.question.count("A. left") == 1
        assert request.sampling.imagine == "never" and request.sampling.top_k == 5
        assert request.sampling.temperature == 0.7 and request.sampling.max_new_tokens == 6
    listed = replace(samples[1], question="Where? A. left B. right C. up D. down")
    requests = prober.requests(listed)
    assert requests is not None
    assert requests[0].sample.question.count("A. left") == 1


def test_frames_that_no_row_lists_come_from_the_rule(prober: Prober, samples: list[Sample]) -> None:
    """The clip has 8 frames, of which the rule shows 0, 4 (rounded half to even) and 7."""
    free = replace(samples[1], frames=(), imagine=((4, 5), (6,)))
    assert frames(prober, free) == [(0, 4, 7), (0, 4, 5, 6, 7)]
    # Places of 4 in 8 frames: 1, 2, 4, 6.
    assert frames(prober, replace(free, pool=4, imagine=((3,), (0,)))) == [
        (0, 4, 7),
        (0, 1, 4, 6, 7),
    ]
    pooled = replace(free, pool=4, frames=(0, 1), imagine=((3,),))
    assert frames(prober, pooled) == [(1, 2), (1, 2, 6)]


def frames(prober: Prober, sample: Sample) -> list[tuple[int, ...]]:
    """Frames of the file that each probe shows."""
    requests = prober.requests(sample)
    assert requests is not None
    return [prober.media.key(request.sample).frames for request in requests]


def test_a_row_without_hints_has_no_probes(prober: Prober, samples: list[Sample]) -> None:
    assert prober.requests(replace(samples[0], imagine=())) is None
    assert prober.requests(replace(samples[0], imagine=((0,), (1,)))) is None


def test_seeds_follow_from_row_probe_and_member(prober: Prober, samples: list[Sample]) -> None:
    def seeds(prober: Prober) -> list[int]:
        found = [prober.requests(sample) for sample in samples]
        return [seed for pair in found if pair for request in pair for seed in request.seeds]

    assert len(set(seeds(prober))) == 4 * 2 * 2
    assert seeds(prober) == seeds(prober)
    assert not set(seeds(prober)) & set(seeds(replace(prober, seed=4)))


def test_a_line_that_was_not_finished_is_dropped(tmp_path: Path) -> None:
    log = ProbeLog(tmp_path / "probes.jsonl")
    assert log.read() == {}
    first, second = row((1, 4), (3, 4)), Probed(skipped="sample 'b': café")
    log.add([("a", "1", first)])
    log.add([("b", "2", second)])
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"id": "c", "finger')
    assert log.read() == {"a": ("1", first), "b": ("2", second)}
    assert log.path.read_bytes() == whole
    log.path.write_bytes(b'{"id": "c"}\n' + whole)
    with pytest.raises(CheckpointError, match="line 1: damaged"):
        log.read()


# Right or wrong by the parity of the ids: a tiny random model gives no right answers. Refuses the
# probes' text, which is none of the row's.
COIN = """
def coin(completion_ids, question, options, **_):
    assert set(question) == {"Where does the square go next?"} and len(options[0]) == 4
    return [None if sum(ids) % 7 == 0 else float(sum(ids) % 2) for ids in completion_ids]
"""


def loaded_recipe(path: Path, *overrides: str) -> SelectRecipe:
    recipe = load_any_recipe(path, overrides)
    assert isinstance(recipe, SelectRecipe)
    return recipe


def select(path: Path, *overrides: str) -> tuple[Selection, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    return run_selection(loaded_recipe(path, *overrides), console), console.export_text()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, clips: Path) -> Path:
    """Six rows, of which one has a broken video and one no hints."""
    folder = tmp_path_factory.mktemp("select")
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    for values in rows:
        values["video"] = str(clips / values["video"])
    (folder / "broken.mp4").write_bytes(Path(rows[0]["video"]).read_bytes()[:300])
    rows.insert(1, {**rows[0], "id": "broken", "video": str(folder / "broken.mp4")})
    rows.insert(3, {**rows[0], "id": "blind", "imagine": None})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "coin.py").write_text(COIN)
    (folder / "mine.jinja").write_text(PROBES.read_text())
    values = {
        "stage": "select",
        "output": "run",
        "policy": {"path": str(tiny_checkpoint)},
        "data": {"candidates": "rows.jsonl", "bad_videos": "skip"},
        "sampling": {"n": 4, "max_completion_length": 6},
        "outcome": {"use": "coin.py:coin"},
        "probes": "mine.jinja",
        "keep": {"top": 2, "min_gain": -1.0, "drop_easy": None},
        "chunk": 4,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path, tiny_checkpoint: Path) -> list[str]:
    """The lines of a log, each row probed alone, by an engine and rewards in this process."""
    loaded = loaded_recipe(recipe)
    found = read_samples(loaded.data.candidates)
    media = MediaProcessor(AutoProcessor.from_pretrained(tiny_checkpoint))
    prober = Prober(ProbePrompts(loaded.probes), media, loaded.sampling, loaded.seed)
    set_seed(loaded.seed)  # rows of ids that no token has are random
    policy = make_policy(str(tiny_checkpoint), media.processor, LatentProtocol(), HeadConfig())
    engine = TransformersEngine(policy, media, LocalMedia(media, 1.0))
    log = ProbeLog(recipe.parent / "alone.jsonl")
    with RewardSet(build_terms([{"use": loaded.outcome.use, "outcome": True}])) as rewards:
        for sample in found.samples:
            results = probe([sample], prober, engine, rewards, skip_broken=True)
            log.add([(sample.id, prober.fingerprint(sample), results[sample.id])])
    return log.path.read_text().splitlines(keepends=True)


def test_a_selection_resumed_in_the_middle_is_that_of_an_uninterrupted_one(
    recipe: Path, clips: Path, uninterrupted: list[str]
) -> None:
    """Whatever the chunks, and whoever samples."""
    folder = recipe.parent / "run"
    RunFolder(folder).claim(loaded_recipe(recipe))
    log = folder / "probes.jsonl"
    log.write_text("".join(uninterrupted[:2]) + uninterrupted[2][:40])
    selection, said = select(recipe)
    assert "2 of 6 rows are probed already" in said
    assert log.read_text() == "".join(uninterrupted)
    assert "Visual gain" in said and "text: 16 answers" in said

    table = pq.read_table(folder / "selection.parquet").to_pylist()
    assert [r["id"] for r in table] == ["clip0", "broken", "clip1", "blind", "clip2", "clip3"]
    by_id = {r["id"]: r for r in table}
    assert by_id["broken"]["reason"] == by_id["blind"]["reason"] == "skipped"
    assert "broken.mp4" in by_id["broken"]["skipped"] and by_id["broken"]["n"] is None
    for line in uninterrupted:
        values = json.loads(line)
        if "skipped" not in values:
            one, text, hinted = by_id[values["id"]], values["text"], values["hinted"]
            assert one["p_text"] == text["right"] / text["judged"]
            assert one["p_hint"] == hinted["right"] / hinted["judged"]
            assert one["gain"] == pytest.approx(one["p_hint"] - one["p_text"])
            assert one["n"] == 4 and one["invalid_text"] == 4 - text["judged"]
    assert len({(r["p_text"], r["p_hint"]) for r in table}) > 2, "the coin fell too evenly"

    # What is kept is the next stage's data: every column of the rows, the best first.
    best = sorted((r["rank"], r["id"]) for r in table if r["kept"])
    kept = read_manifest(folder / "kept.jsonl")
    original = {s.id: s for s in read_manifest(clips / "manifest.jsonl")}
    assert kept == [original[id] for _, id in best] == selection.kept()
    assert [rank for rank, _ in best] == [1, 2]
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [s["id"] for s in skipped] == ["broken", "blind"]
    assert (folder / "histogram.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rows"] == 6 and summary["kept"] == 2 and summary["keep"]["top"] == 2
    assert summary["probes"]["hinted"]["answers"] == 16

    # Finished, it chooses anew without sampling.
    selection, said = select(recipe, "keep.top=1")
    assert "6 of 6 rows are probed already" in said and "samples" not in said
    assert read_manifest(folder / "kept.jsonl") == selection.kept() == kept[:1]


def test_a_selection_does_not_go_on_with_other_settings(recipe: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.claim(loaded_recipe(recipe))
    run.claim(loaded_recipe(recipe, "keep.top=7", "chunk=1", "data.limit=2", "rollouts.workers=3"))
    with pytest.raises(RecipeError, match=r"differs in sampling\.temperature, seed;"):
        run.claim(loaded_recipe(recipe, "sampling.temperature=0.5", "seed=1"))


def test_rows_that_have_changed_since_are_not_taken_for_probed(
    prober: Prober, samples: list[Sample], tmp_path: Path
) -> None:
    sample, path = samples[1], tmp_path / "mine.jinja"
    path.write_text(PROBES.read_text().replace("few", "couple of"))
    before = prober.fingerprint(sample)
    assert prober.fingerprint(replace(sample, id="x", extra={})) == before
    others = [
        prober.fingerprint(replace(sample, answer="C")),
        prober.fingerprint(replace(sample, imagine=((4,),))),
        prober.fingerprint(replace(sample, question="Where?")),
        replace(prober, prompts=ProbePrompts(path)).fingerprint(sample),
    ]
    assert len({before, *others}) == 5
    found = {"a": (before, row((1, 4), (3, 4)))}
    check_fingerprints(found, {"a": before, "b": before}, path)
    with pytest.raises(RecipeError, match="probes of 1 rows that have changed since, such as 'a'"):
        check_fingerprints(found, {"a": others[0]}, path)


def test_what_would_fail_is_found_by_checking(recipe: Path) -> None:
    accuracy = ["--set", "outcome.use=accuracy"]
    found = CliRunner().invoke(app, ["check", str(recipe), *accuracy])
    assert found.exit_code == 0 and "6 rows to probe" in found.output
    blind = recipe.parent / "blind.jsonl"
    rows = [json.loads(x) for x in (recipe.parent / "rows.jsonl").read_text().splitlines()]
    blind.write_text("".join(json.dumps({**r, "imagine": None}) + "\n" for r in rows))
    for command in ("select", "run"):
        change = ["--set", "data.candidates=./blind.jsonl"]
        found = CliRunner().invoke(app, [command, str(recipe), *accuracy, *change])
        assert found.exit_code == 2 and "has `imagine`" in found.output


def test_the_recipe_for_the_real_model_is_one() -> None:
    recipe = loaded_recipe(PROBES.with_name("select.yaml"))
    assert recipe.probes == PROBES and recipe.sampling.n == 8 and recipe.keep.top == 50_000
