"""What the study compares: LA-DAPO, and what becomes of it without one of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.study.seed import Changes
from recipes.study.world import LATENTS


@dataclass(frozen=True)
class Variant:
    """A row of the table: which SFT it starts from, and what it changes in ``la_dapo.yaml``."""

    label: str
    sft: str = "sft"
    rl: Changes = field(default_factory=dict)


_WEIGHTS = {
    "accuracy": 0.9,
    "format": 0.1,
    "outcome_contrastive": 0.2,
    "temporal_diversity": 0.1,
}


def _without(reward: str) -> Changes:
    return {"rewards": [{"use": n, "weight": w} for n, w in _WEIGHTS.items() if n != reward]}


_NO_NOISE: Changes = {
    "policy.noise_scale": 0.0,
    "train.latent_alpha": 0.0,
    "train.latent_beta": 0.0,
}

# The SFT runs: the rows' style (see `recipes.study.world`).
SFT = {"sft": "latents", "sft_text": "text"}

VARIANTS = {
    "la_dapo": Variant("LA-DAPO"),
    "no_contrast": Variant("without R_ctr", rl=_without("outcome_contrastive")),
    "no_diversity": Variant("without R_div", rl=_without("temporal_diversity")),
    "text_only": Variant(
        "text only",
        sft="sft_text",
        # Rewards and terms about latents have nothing to look at, and the grammar asks for spans.
        rl={
            "rewards": [
                {"use": "accuracy", "weight": 0.9},
                {"use": "format", "weight": 0.1, "options": {"grammar": "answer"}},
            ],
            "train.imagine": "never",
            "train.latent_alpha": 0.0,
            "train.latent_beta": 0.0,
        },
    ),
    "fixed_budget": Variant(
        "fixed budget", rl={"policy.min_length": LATENTS, "policy.max_length": LATENTS}
    ),
    # What the released code computes, and between it and ours: its latents without its scoring. The
    # latents of so small a model are short: with this κ, κ‖z‖² is what it is in the real one.
    "published": Variant("published objective", rl={"train.objective": "published", **_NO_NOISE}),
    "published_scaled": Variant(
        "published, κ to scale",
        rl={"train.objective": "published", "train.published_kappa": 9.0, **_NO_NOISE},
    ),
    "no_noise": Variant("exact, no noise", rl=_NO_NOISE),
}
