"""Specs of a recipe, right and wrong; where rewards are found."""

import pytest

from rewards.functions import find, load, read_signature
from rewards.look import look
from rewards.registry import BUILTIN, build_terms, check_signature
from rewards.terms import RewardTerm, overweight
from rl.errors import RecipeError

ACCURACY = {"use": "accuracy"}
JUDGE = {"base_url": "http://localhost:1/v1", "model": "judge"}


def spec(name):
    needed = {"judge": JUDGE, "latent_alignment": {"policy": "folder"}}
    return {"use": name, "options": needed.get(name, {})}


def test_every_reward_by_its_name_with_its_weight():
    terms = build_terms([spec(name) for name in BUILTIN])
    assert {term.name: term.weight for term in terms} == {
        "accuracy": 0.9,
        "format": 0.1,
        "outcome_contrastive": 0.2,
        "temporal_diversity": 0.1,
        "repetition": 0.1,
        "length": 0.1,
        "temporal_order": 0.3,
        "latent_alignment": 0.1,
        "judge": 0.1,
    }
    assert [term.name for term in terms if not term.shaping] == ["accuracy"]
    alone = [term.name for term in terms if term.process is None]
    assert alone == ["latent_alignment", "judge"]
    assert all(term.range is not None for term in terms)
    assert all(read_signature(load(term.seat.target)).summary for term in terms)


def test_the_range_of_the_published_contrast_depends_on_its_temperature():
    options = {"scale": "published", "temperature": 0.25}
    (term,) = build_terms([{"use": "outcome_contrastive", "options": options}])
    assert term.range == (0.0, 4.0)
    assert build_terms([{"use": "outcome_contrastive"}])[0].range == (0.0, 1.0)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (
            {"use": "temporal_diversty"},
            r"rewards\[1\]: unknown reward 'temporal_diversty'; did you mean 'temporal_div",
        ),
        ({"use": "format", "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"weight": 1}, "has no `use`"),
        ({"use": "format", "weight": "much"}, "weight is 'much'"),
        ({"use": "format", "weight": True}, "weight is True"),
        (
            {"use": "format", "options": {"gramar": "any"}},
            "unknown option 'gramar'; did you mean 'grammar'",
        ),
        ({"use": "repetition", "options": {"n": 4}}, "unknown option 'n'; known: none"),
        ({"use": "format", "options": {"grammar": "free"}}, "grammar is 'free'"),
        ({"use": "outcome_contrastive", "options": {"scale": "paper"}}, "scale is 'paper'"),
        ({"use": "outcome_contrastive", "options": {"temperature": -1}}, "temperature is -1"),
        ({"use": "length", "options": {"buffer": 0}}, "buffer 0"),
        ({"use": "temporal_order", "options": {"threshold": -1}}, "threshold is -1"),
        ({"use": "judge"}, "'base_url'"),
        ({"use": "judge", "options": {**JUDGE, "style": "kind"}}, "style is 'kind'"),
        (
            {"use": "judge", "timeout_s": 60, "options": {**JUDGE, "patience_s": 90}},
            "patience_s is 90 seconds and the reward's timeout_s 60",
        ),
        ({"use": "mine.py:f"}, r"there is no file .*mine\.py"),
        ({"use": "mine.py:"}, "names no reward"),
        ({"use": "package:some.thing"}, "names no reward"),
    ],
)  # fmt: skip
def test_mistakes_fail_with_their_place_and_a_hint(spec, complaint, tmp_path):
    with pytest.raises(RecipeError, match=complaint):
        build_terms([ACCURACY, spec], tmp_path)


def test_a_judge_is_done_before_its_deadline():
    def patience(**keys):
        (term,) = build_terms([{"use": "judge", "options": JUDGE, **keys}])
        return term.options["patience_s"]

    assert patience() == 300.0 and patience(timeout_s=100.0) == 80.0


def test_another_reward_may_decide_the_outcome():
    terms = build_terms([ACCURACY, {"use": "judge", "options": JUDGE, "outcome": True}])
    assert [(term.name, term.shaping) for term in terms] == [("accuracy", True), ("judge", False)]


def test_where_a_reward_is_found(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    builtin = {"format": "rewards.format:format_rewards"}
    assert find("mine.py:f", tmp_path, builtin).target == f"{tmp_path / 'mine.py'}:f"
    assert find("./mine.py:f", tmp_path, builtin).origin == str(tmp_path / "mine.py")
    assert find("format", tmp_path, builtin).origin == "built in"
    assert find("trl.rewards:think_format_reward", tmp_path, builtin).origin == "trl"


def test_signatures():
    def function(completions, answer, *, bonus=0.5, trainer_state=None, log_metric, **columns):
        """What it does.

        More."""

    function.range = (0, 2)  # type: ignore[attr-defined]
    found = read_signature(function)
    assert found.required == ("completions", "answer", "log_metric")
    assert found.options == {"bonus": "0.5"} and found.range == (0.0, 2.0)
    assert found.summary == "What it does."
    assert found.wants("question") and not found.wants("trajectories")

    class Thing:
        def __init__(self, size, depth=1): ...

        async def __call__(self, trajectories): ...

    found = read_signature(Thing)
    assert found.options == {"size": None, "depth": "1"}
    assert found.wants("trajectories") and not found.wants("question")
    with pytest.raises(TypeError, match="no __call__"):
        read_signature(type("Dumb", (), {}))
    with pytest.raises(TypeError, match="positional only"):
        read_signature(eval("lambda completions, /: []"))


def test_columns_and_options_that_do_not_fit():
    def needs(completions, solution, *, size=1):
        return [0.0]

    term = RewardTerm("mine", needs, options={"siz": 2})
    with pytest.raises(RecipeError, match="unknown option 'siz'; did you mean 'size'"):
        check_signature(term, read_signature(needs), ["solution"])
    term = RewardTerm("mine", needs)
    check_signature(term, read_signature(needs), ["solution"])
    check_signature(RewardTerm("mine", needs, options={"solution": "4"}), read_signature(needs), [])
    with pytest.raises(RecipeError, match=r"'mine' asks for \['solution'\]"):
        check_signature(term, read_signature(needs), ["hop"])


def test_looking_imports_elsewhere(tmp_path):
    (tmp_path / "mine.py").write_text("print('hello')\ndef f(completions, size=2): 'Short.'\n")
    (tmp_path / "bad.py").write_text("import nothing_like_that")
    good, bad = look([f"{tmp_path / 'mine.py'}:f", f"{tmp_path / 'bad.py'}:f"])
    assert not isinstance(good, RecipeError)
    assert (good.options, good.summary) == ({"size": "2"}, "Short.")
    assert isinstance(bad, RecipeError) and "No module named 'nothing_like_that'" in str(bad)
    assert look([]) == []


def test_overweight():
    def any_reward(**_):
        return []

    terms = [
        RewardTerm("right", any_reward, 0.9, shaping=False),
        RewardTerm("a", any_reward, -0.5),
        RewardTerm("b", any_reward, 0.25),
        RewardTerm("c", any_reward, 9.0),  # without a range nothing can be said of it beforehand
    ]
    assert overweight(terms, {"right": (0, 1), "a": (0, 1), "b": (0, 1)}) == []
    (alone,) = overweight(terms, {"a": (-1, 1), "b": (0, 1)})
    assert "'a' can outweigh the outcome: weight times range is 1, and right or wrong" in alone
    (together,) = overweight(terms, {"a": (0, 1), "b": (0, 2)})
    assert "rewards a, b together" in together and "sum to 1," in together
