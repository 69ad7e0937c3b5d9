"""Specs of a recipe, right and wrong."""

import pytest

from rewards.registry import BUILTIN, build_rewards
from rl.errors import RecipeError

ACCURACY = {"use": "accuracy"}


def test_every_reward_by_its_name_with_the_published_weights():
    rewards = build_rewards([{"use": name} for name in BUILTIN])
    weights = dict(zip(rewards.names, rewards.weights, strict=True))
    assert weights == {
        "accuracy": 0.9,
        "format": 0.1,
        "outcome_contrastive": 0.2,
        "temporal_diversity": 0.1,
        "repetition": 0.1,
    }


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
    ],
)  # fmt: skip
def test_mistakes_fail_with_their_place_and_a_hint(spec, complaint):
    with pytest.raises(RecipeError, match=complaint):
        build_rewards([ACCURACY, spec])
