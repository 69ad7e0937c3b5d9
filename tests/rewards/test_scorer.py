"""`RewardSet` over real trajectories: order, missing values, broken rewards."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from rewards.registry import build_rewards
from rewards.scorer import RewardSet, RewardTerm
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


def accuracy_and(function, **term):
    return RewardSet(
        [RewardTerm("mine", function, **term), *build_rewards([{"use": "accuracy"}]).terms]
    )


def test_outcome_comes_first_and_every_component_is_kept():
    rewards = build_rewards(
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
    assert tuple(t.__name__ for t in rewards.terms) == rewards.names
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
    rewards = build_rewards([{"use": "accuracy"}, {"use": "outcome_contrastive"}])
    groups = two_groups()
    together = rewards.score(groups, rewards.outcomes(groups))
    for here, alone in zip(together, groups, strict=True):
        (apart,) = rewards.score([alone], rewards.outcomes([alone]))
        np.testing.assert_allclose(
            here.components["outcome_contrastive"], apart.components["outcome_contrastive"]
        )


def test_an_invalid_outcome_empties_its_row_and_leaves_the_others_alone():
    rewards = build_rewards(
        [{"use": "accuracy"}, {"use": "format"}, {"use": "outcome_contrastive"}]
    )
    whole, less = two_groups()[0], two_groups()[0]
    less = TrajectoryGroup(less.sample, less.trajectories[:2])
    (scores,) = rewards.score([whole], [[1.0, 1.0, math.nan]])
    (expected,) = rewards.score([less], [[1.0, 1.0]])
    for name in rewards.names:
        assert math.isnan(scores.components[name][2])
        assert scores.components[name][:2] == expected.components[name]


def test_a_row_whose_reference_fits_no_option_is_invalid():
    rewards = build_rewards([{"use": "accuracy"}])
    assert np.isnan(rewards.outcomes([group("odd", (RIGHT, [EAST]), answer="up")])).all()


def test_a_reward_gets_the_columns_of_the_batch_and_its_options():
    seen = {}

    def spy(**columns):
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


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (boom, r"raised KeyError: 'label'"),
        (lambda **_: [1.0], "returned 1 values for 5 completions"),
        (lambda **_: None, "raised TypeError"),
        (lambda **_: ["1.0"] * 5, r"returned '1\.0' for sample 'one'"),
        (lambda **_: [0.0] * 4 + [math.inf], "returned inf for sample 'two'"),
        (lambda **_: [[0.0]] * 5, r"returned \[0.0\] for sample 'one'"),
    ],
)
def test_a_broken_reward_is_named(function, complaint):
    rewards, groups = accuracy_and(function), two_groups()
    with pytest.raises(RewardError, match=f"reward 'mine' {complaint}") as caught:
        rewards.score(groups, rewards.outcomes(groups))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_numpy_and_torch_numbers_are_numbers():
    rewards, groups = accuracy_and(lambda **_: torch.arange(5)), two_groups()
    one, two = rewards.score(groups, rewards.outcomes(groups))
    assert one.components["mine"] + two.components["mine"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_an_outcome_is_right_or_wrong():
    rewards = RewardSet([RewardTerm("half", lambda **_: [0.5], shaping=False)])
    with pytest.raises(RewardError, match=r"'half' decides the outcome but returned 0\.5"):
        rewards.outcomes([group("one", (RIGHT, [EAST]))])


def test_sets_that_make_no_sense():
    with pytest.raises(RecipeError, match=r"0 of .* decide the outcome"):
        RewardSet([])
    with pytest.raises(RecipeError, match=r"2 of .* decide the outcome"):
        build_rewards([{"use": "accuracy"}, {"use": "accuracy"}])
    with pytest.raises(RecipeError, match=r"\['format'\] appear more than once"):
        build_rewards([{"use": "accuracy"}, {"use": "format"}, {"use": "format"}])
    with pytest.raises(RecipeError, match="weight is nan"):
        RewardTerm("mine", boom, weight=math.nan)


def test_outcomes_of_other_groups_and_reserved_columns_are_refused():
    rewards = build_rewards([{"use": "accuracy"}])
    with pytest.raises(RewardError, match=r"groups of \[1\] trajectories"):
        rewards.score(two_groups(), [[1.0]])
    with pytest.raises(DataError, match=r"\['outcomes'\] have names"):
        rewards.outcomes([group("one", (RIGHT, [EAST]), outcomes=1)])


def test_an_empty_batch():
    rewards = build_rewards([{"use": "accuracy"}, {"use": "outcome_contrastive"}])
    assert rewards.outcomes([]) == []
    assert rewards.score([], []) == []


def test_a_set_survives_pickling():
    rewards = build_rewards(
        [{"use": "accuracy"}, {"use": "format", "options": {"grammar": "answer"}}]
    )
    copy, groups = pickle.loads(pickle.dumps(rewards)), two_groups()
    outcomes = copy.outcomes(groups)
    assert copy.score(groups, outcomes) == rewards.score(groups, outcomes)


def test_importing_rewards_loads_nothing_heavy():
    code = (
        "import sys, rewards; assert 'torch' not in sys.modules;"
        "import rewards.registry, rewards.scorer;"
        "heavy = {'ray', 'trl', 'transformers', 'vllm'} & {*sys.modules}; assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
