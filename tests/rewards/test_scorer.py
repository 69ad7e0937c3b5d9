"""`RewardSet` over real trajectories: order, missing values, broken rewards."""

import asyncio
import json
import math
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rewards.registry import build_terms
from rewards.scorer import RewardSet
from rewards.terms import RewardTerm
from rewards.values import Invalid
from rl.errors import DataError, RecipeError, RewardError
from rl.trajectory import Sample, Sampling, Trajectory, TrajectoryGroup

FILLER = 9
LATENT = "<|latent_start|><|latent|><|latent_end|>"
EAST, NORTH = [1.0, 0.0], [0.0, 1.0]


def trajectory(sample, text, *spans):
    """A trajectory whose spans hold the given latents, one list of vectors a span."""
    latents = torch.tensor([z for span in spans for z in span]).reshape(-1, 2).to(torch.bfloat16)
    ids = np.array([1] + [FILLER] * len(latents) + [2])
    return Trajectory(
        sample_id=sample.id,
        prompt_ids=np.array([0]),
        completion_ids=ids,
        decision=np.ones(len(ids), dtype=np.int8),
        logprobs=np.zeros(len(ids), dtype=np.float32),
        kept=np.zeros(len(ids), dtype=np.int32),
        latents=latents,
        latent_logprobs=np.zeros(len(latents)),
        span_lengths=tuple(len(span) for span in spans),
        filler=FILLER,
        media=(),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text=text,
    )


def group(name, *rows, answer="A", **extra):
    sample = Sample(name, f"{name}.mp4", "Where?", answer, options=("left", "right"), extra=extra)
    return TrajectoryGroup(sample, tuple(trajectory(sample, *row) for row in rows))


RIGHT, WRONG = f"{LATENT}<answer>A</answer>", f"{LATENT}<answer>B</answer>"


def two_groups():
    return [
        group("one", (RIGHT, [EAST], [NORTH]), (RIGHT, [EAST]), (WRONG, [NORTH])),
        group("two", (WRONG, [EAST], [EAST]), ("<answer>A</answer>",)),
    ]


def inline(specs, **settings):
    return RewardSet(build_terms(specs), **settings)


def accuracy_and(function, **term):
    return RewardSet([RewardTerm("mine", function, **term), *build_terms([{"use": "accuracy"}])])


def test_outcome_comes_first_and_every_component_is_kept():
    rewards = inline(
        [
            {"use": "format", "options": {"grammar": "answer"}},
            {"use": "outcome_contrastive"},
            {"use": "temporal_diversity"},
            {"use": "repetition", "weight": 0.05},
            {"use": "accuracy"},
        ]
    )
    assert rewards.names == (
        "accuracy", "format", "outcome_contrastive", "temporal_diversity", "repetition",
    )  # fmt: skip
    assert rewards.weights == (0.9, 0.1, 0.2, 0.1, 0.05)
    groups = two_groups()
    outcomes = rewards.outcomes(groups)
    assert outcomes == [[1.0, 1.0, 0.0], [0.0, 1.0]]
    one, two = rewards.score(groups, outcomes)
    assert one.outcome == one.components["accuracy"] == [1.0, 1.0, 0.0]
    assert one.components["format"] == [1.0, 1.0, 1.0]
    # Right ones agree on the shared first step (1) and are at 1/2 from the wrong one; the wrong one
    # is at 1/2 from the right ones and has no other wrong one (1/2).
    high = 1 / (1 + math.exp(-1))
    assert one.components["outcome_contrastive"] == pytest.approx([high, high, 0.5], abs=1e-5)
    assert one.components["temporal_diversity"] == [0.0, 0.0, 0.0]
    assert two.components["temporal_diversity"] == pytest.approx([-1.0, 0.0])
    assert np.isnan(two.components["outcome_contrastive"]).all()  # nobody to compare with
    assert two.components["repetition"] == [0.0, 0.0]


def test_groups_do_not_see_each_other():
    rewards = inline([{"use": "accuracy"}, {"use": "outcome_contrastive"}])
    groups = two_groups()
    together = rewards.score(groups, rewards.outcomes(groups))
    for here, alone in zip(together, groups, strict=True):
        (apart,) = rewards.score([alone], rewards.outcomes([alone]))
        np.testing.assert_allclose(
            here.components["outcome_contrastive"], apart.components["outcome_contrastive"]
        )


def test_an_invalid_outcome_empties_its_row_and_leaves_the_others_alone():
    rewards = inline([{"use": "accuracy"}, {"use": "format"}, {"use": "outcome_contrastive"}])
    whole, less = two_groups()[0], two_groups()[0]
    less = TrajectoryGroup(less.sample, less.trajectories[:2])
    (scores,) = rewards.score([whole], [[1.0, 1.0, math.nan]])
    (expected,) = rewards.score([less], [[1.0, 1.0]])
    for name in rewards.names:
        assert math.isnan(scores.components[name][2])
        assert scores.components[name][:2] == expected.components[name]


def test_a_row_whose_reference_fits_no_option_is_invalid():
    rewards = inline([{"use": "accuracy"}], max_invalid=1.0)
    assert np.isnan(rewards.outcomes([group("odd", (RIGHT, [EAST]), answer="up")])).all()


def test_a_reward_gets_the_columns_of_the_batch_and_its_options():
    seen = {}

    def spy(trajectories, **columns):
        seen["trajectories"] = trajectories
        seen.update(columns)
        return [None] * len(columns["completions"])

    groups = [group("one", ("a",), ("b",), hop=2, depth=1), group("two", ("c",), depth=3)]
    rewards = accuracy_and(spy, options={"depth": 7})
    (first, second) = rewards.score(groups, rewards.outcomes(groups))
    assert seen["id"] == ["one", "one", "two"]
    assert seen["group_ids"] == [0, 0, 1]
    assert seen["hop"] == [2, 2, None]
    assert seen["depth"] == 7  # an option wins over a column
    assert seen["outcomes"] == [0.0, 0.0, 0.0]
    assert seen["prompts"][0] == [{"role": "user", "content": "Where?"}]
    assert [c[0]["content"] for c in seen["completions"]] == ["a", "b", "c"]
    assert seen["completion_ids"] == [[1, 2]] * 3
    assert [t.text for t in seen["trajectories"]] == ["a", "b", "c"]
    assert np.isnan(first.components["mine"] + second.components["mine"]).all()


def boom(**_):
    raise KeyError("label")


def exits(**_):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (boom, "raised KeyError: 'label'"),
        (exits, "raised SystemExit: 3"),
        (lambda **_: [1.0], "returned 1 values for 2 completions"),
        (lambda **_: None, "raised TypeError"),
    ],
)
def test_a_call_that_fails_has_no_values_and_says_why(function, reason):
    rewards, groups = accuracy_and(function, weight=0.1), two_groups()
    rewards = RewardSet(rewards.terms, max_invalid=1.0)
    one, two = rewards.score(groups, rewards.outcomes(groups))
    assert np.isnan(one.components["mine"] + two.components["mine"]).all()
    assert all(reason in text for text in two.invalid["mine"])
    assert one.components["accuracy"] == [1.0, 1.0, 0.0] and "accuracy" not in one.invalid
    assert dict(rewards.log().metrics)["rewards/mine/invalid"] == 1.0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("1.0", "returned '1.0' of type str, not a number"),
        (math.inf, "returned inf; for no value return None"),
        (math.nan, "returned nan; for no value return None"),
        ([0.0], "returned [0.0] of type list, not a number"),
        (np.zeros(2), "which is no number"),
        (7.0, "returned 7, outside of its range -1 to 1"),
        (Invalid("the judge is down"), "the judge is down"),
        (Invalid(""), "invalid, with no reason given"),
    ],
)
def test_a_wrong_value_is_invalid_and_the_others_stay(value, reason):
    rewards = accuracy_and(lambda **_: [0.25] * 4 + [value], range=(-1.0, 1.0))
    groups = two_groups()
    one, two = rewards.score(groups, rewards.outcomes(groups))
    assert one.components["mine"] + two.components["mine"][:1] == [0.25] * 4
    assert math.isnan(two.components["mine"][1])
    assert two.invalid["mine"][0] == "" and reason in two.invalid["mine"][1]
    assert "mine" not in one.invalid
    assert dict(rewards.log().metrics)["rewards/mine/invalid"] == 0.2


def test_columns_do_not_pass_for_options():
    """A manifest may well have columns such as `kind`, `start` and `scale`."""
    extra = {"kind": "ball", "start": 3, "grammar": "x", "scale": 2.0, "bonus": 5.0, "spare": 7.0}
    rows = (RIGHT, [EAST], [NORTH]), (RIGHT, [EAST]), (WRONG, [NORTH])

    def mine(completions, spare: Any = 1.0, *, bonus=0.5, **_):
        return [bonus + (spare if isinstance(spare, float) else spare[0])] * len(completions)

    terms = build_terms([{"use": "accuracy"}, {"use": "format"}, {"use": "outcome_contrastive"}])
    rewards = RewardSet([*terms, RewardTerm("mine", mine, 0.01)])
    both = [[group("one", *rows)], [group("odd", *rows, **extra)]]
    (plain,), (found,) = (rewards.score(g, rewards.outcomes(g)) for g in both)
    for name in ("accuracy", "format", "outcome_contrastive"):
        assert found.components[name] == plain.components[name]
    assert found.invalid == {}
    assert plain.components["mine"] == [1.5] * 3
    assert found.components["mine"] == [7.5] * 3  # TRL hands columns to positional parameters


def test_a_column_that_this_batch_lacks_is_all_none():
    def needs(completions, objects, **_):
        return [None if o is None else 1.0 for o in objects]

    rewards = accuracy_and(needs)
    groups = [group("one", (RIGHT, [EAST])), group("two", (RIGHT, [EAST]), objects=["ball"])]
    one, two = rewards.score(groups, rewards.outcomes(groups))
    assert math.isnan(one.components["mine"][0]) and two.components["mine"] == [1.0]
    (one,) = rewards.score(groups[:1], rewards.outcomes(groups[:1]))
    assert math.isnan(one.components["mine"][0]) and one.invalid == {}


def test_no_value_is_no_fault():
    rewards, groups = accuracy_and(lambda **_: [None, 1.0, 0.0, None, None]), two_groups()
    one, two = rewards.score(groups, rewards.outcomes(groups))
    assert one.components["mine"][1:] == [1.0, 0.0] and one.invalid == two.invalid == {}
    assert dict(rewards.log().metrics)["rewards/mine/invalid"] == 0.0


def test_one_bad_group_costs_itself_only(caplog):
    def picky(completions, id, **_):
        if "two" in id:
            raise ValueError("two is odd")
        return [0.5] * len(completions)

    rewards = accuracy_and(picky)
    groups = [*two_groups(), group("three", (RIGHT, [EAST]))]
    one, two, three = rewards.score(groups, rewards.outcomes(groups))
    assert one.components["mine"] + three.components["mine"] == [0.5] * 4
    assert two.invalid["mine"] == ["raised ValueError: two is odd"] * 2
    assert "'mine': raised ValueError: two is odd" in caplog.text and "'two'" in caplog.text


def test_numpy_and_torch_numbers_are_numbers():
    rewards, groups = accuracy_and(lambda **_: torch.arange(5)), two_groups()
    one, two = rewards.score(groups, rewards.outcomes(groups))
    assert one.components["mine"] + two.components["mine"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_an_outcome_is_right_or_wrong():
    terms = [RewardTerm("half", lambda **_: [0.5, 1.0, None, 0.0], shaping=False)]
    rewards = RewardSet(terms)
    groups = [group("one", *[(RIGHT, [EAST])] * 4)]
    (row,) = rewards.outcomes(groups)
    np.testing.assert_equal(row, [math.nan, 1.0, math.nan, 0.0])
    # A row nobody can judge counts as invalid too: with nothing but such rows nothing is trained.
    assert dict(rewards.log().metrics)["rewards/half/invalid"] == 0.5
    (scores,) = rewards.score(groups, [row])
    reasons = scores.invalid["half"]
    assert "returned 0.5; an outcome is" in reasons[0] and "gave no value" in reasons[2]
    assert reasons[1] == reasons[3] == ""


def test_shaping_is_gated_in_groups_without_contrast():
    groups = [*two_groups(), group("three", (RIGHT, [EAST]), (RIGHT, [NORTH]))]
    specs = [{"use": "accuracy"}, {"use": "format"}]
    outcomes = [[1.0, 1.0, 0.0], [math.nan, 1.0], [1.0, 1.0]]
    assert [s.gated for s in inline(specs).score(groups, outcomes)] == [False, True, True]
    open_gate = inline(specs, gate_shaping=False).score(groups, outcomes)
    assert [s.gated for s in open_gate] == [False, False, False]


def test_too_many_invalid_values_stop_the_run_with_a_report(tmp_path):
    broken = {"now": False}

    def flaky(completions, **_):
        if broken["now"]:
            raise ConnectionError("no route to host")
        return [1.0] * len(completions)

    groups = two_groups()
    terms = accuracy_and(flaky, weight=0.1).terms
    file = tmp_path / "run" / "faults.jsonl"
    # A round without valid values counts a quarter, also while there are fewer than four.
    rewards = RewardSet(terms, max_invalid=0.3, faults=file)
    for step, down in enumerate([False, True, True]):
        rewards.begin(SimpleNamespace(global_step=step))
        broken["now"] = down
        outcomes = rewards.outcomes(groups)
        if step < 2:
            rewards.score(groups, outcomes)
    with pytest.raises(RewardError) as caught:
        rewards.score(groups, outcomes)
    report = str(caught.value)
    assert "'mine' has no valid value for 10 of the last 15 trajectories" in report
    assert "scoring.max_invalid is 30% over 4 steps" in report
    # Each time the whole batch and then each of its two groups.
    assert "6 times raised: raised ConnectionError: no route to host" in report
    assert "samples: 'one', 'two'" in report and str(file) in report
    assert "in flaky" in report  # the traceback
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["lost"] for line in lines] == [0, 3, 2, 0, 3, 2]
    assert [line["step"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert {line["reward"] for line in lines} == {"mine"}


def test_old_steps_are_forgotten():
    """A reward that was down for two steps long ago does not stop a run later."""
    broken = {"now": False}
    groups = two_groups()

    def flaky(completions, **_):
        return [Invalid("down") if broken["now"] else 1.0] * len(completions)

    rewards = accuracy_and(flaky, weight=0.1)
    for down in [True, True, False, False, True, True, False, False, True, False]:
        rewards.begin(SimpleNamespace(global_step=0))
        broken["now"] = down
        rewards.score(groups, rewards.outcomes(groups))


def test_what_rewards_log_and_are_told(caplog):
    def outcome(completions, log_extra, **_):
        log_extra("length", [len(c[0]["content"]) for c in completions])
        return [float("A" in c[0]["content"]) for c in completions]

    def shaping(completions, trainer_state, log_metric, log_extra, **_):
        log_metric("seen", trainer_state.global_step)
        log_extra("uneven", [1])  # TRL could not show it
        return [0.1 * trainer_state.max_steps] * len(completions)

    rewards = RewardSet(
        [RewardTerm("outcome", outcome, shaping=False), RewardTerm("shaping", shaping, 0.1)]
    )
    rewards.begin(SimpleNamespace(global_step=7, max_steps=10))
    groups = [group("one", ("A",), ("AB",)), group("two", ("xyz",), ("xyzA",))]
    outcomes = rewards.outcomes(groups)
    # The collector may keep another order, and fewer.
    scores = rewards.score(groups[1:], outcomes[1:])
    assert scores[0].components["shaping"] == [1.0, 1.0]
    log = rewards.log()
    assert ("seen", 7.0) in log.metrics and log.extras == {"length": [3, 4]}
    assert "log_extra was not given one value a completion for ['uneven']" in caplog.text
    assert rewards.log().extras == {}


def test_async_functions_and_classes():
    class Counter:
        """Counts its calls."""

        def __init__(self, step=1):
            self.step, self.calls = step, 0

        async def __call__(self, completions, **_):
            await asyncio.sleep(0)
            self.calls += self.step
            return [self.calls] * len(completions)

    rewards = accuracy_and(Counter, options={"step": 3}, weight=0.01)
    groups = two_groups()[:1]
    for expected in (3.0, 6.0):
        (scores,) = rewards.score(groups, rewards.outcomes(groups))
        assert scores.components["mine"] == [expected] * 3


def test_the_control_reaches_those_who_name_it():
    def order(outcomes, shuffled_outcomes, **_):
        return [sum(row) - o for o, row in zip(outcomes, shuffled_outcomes, strict=True)]

    assert not inline([{"use": "accuracy"}]).wants_shuffled
    rewards, groups = accuracy_and(order), two_groups()
    assert rewards.wants_shuffled
    one, two = rewards.score(groups, rewards.outcomes(groups), [[1.0], [0.0]])
    assert one.components["mine"] == [0.0, 0.0, 1.0] and two.components["mine"] == [0.0, -1.0]


def test_shaping_that_outweighs_the_outcome_is_noticed(caplog):
    def wide(completions, **_):
        return [2.0 * i for i in range(len(completions))]

    groups = [group("one", (RIGHT, [EAST]), (WRONG, [NORTH]))]
    known = accuracy_and(wide, range=(0.0, 4.0))
    known.start()
    assert "'mine' can outweigh the outcome: weight times range is 4" in caplog.text
    caplog.clear()
    unknown = accuracy_and(wide)
    for _ in range(2):
        unknown.score(groups, unknown.outcomes(groups))
    # accuracy weighs 0.9 and the two differ by 2
    assert caplog.text.count("'mine' outweighs the outcome: within one group it differs by 2") == 1


def test_sets_that_make_no_sense():
    with pytest.raises(RecipeError, match=r"none of \[\] decide the outcome"):
        RewardSet([])
    with pytest.raises(RecipeError, match=r"\['accuracy', 'again'\] of .* decide the outcome"):
        inline([{"use": "accuracy"}, {"use": "accuracy", "name": "again"}])
    with pytest.raises(RecipeError, match=r"\['format'\] appear more than once"):
        inline([{"use": "accuracy"}, {"use": "format"}, {"use": "format"}])
    with pytest.raises(RecipeError, match="weight is nan"):
        RewardTerm("mine", boom, weight=math.nan)


def test_outcomes_of_other_groups_and_reserved_columns_are_refused():
    rewards = inline([{"use": "accuracy"}])
    with pytest.raises(RewardError, match=r"groups of \[1\] trajectories"):
        rewards.score(two_groups(), [[1.0]])
    with pytest.raises(DataError, match=r"\['outcomes'\] have names"):
        rewards.outcomes([group("one", (RIGHT, [EAST]), outcomes=1)])


def test_an_empty_batch():
    rewards = inline([{"use": "accuracy"}, {"use": "outcome_contrastive"}])
    assert rewards.outcomes([]) == []
    assert rewards.score([], []) == []


def test_importing_rewards_loads_nothing_heavy():
    code = (
        "import sys, rewards; assert 'torch' not in sys.modules;"
        "import rewards.registry, rewards.scorer;"
        "heavy = {'ray', 'trl', 'transformers', 'vllm'} & {*sys.modules}; assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
