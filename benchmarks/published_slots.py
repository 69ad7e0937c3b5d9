"""Where the released objective pulls: its log-probs and gradients by the kind of slot.

    python -m benchmarks.published_slots POLICY ROWS   # of a seed of `foresight study`:
                                                       # sft/policy, select/kept.jsonl

Samples trajectories of a policy and scores them as Future-L1's released code does (`rl.published`)
and exactly. The gradient of a kind is the norm of Σ A · log π over its slots, divided by all
tokens, with the same random advantages A (one a trajectory) in both columns.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import AutoProcessor

from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.loading import load_policy
from rl.policy.protocol import LatentTokens
from rl.published import collate_published, replay_published
from rl.scoring import collate, replay
from rl.trajectory import RolloutRequest, Sampling, Trajectory
from rollouts.transformers_engine import TransformersEngine

KINDS = (
    "text before a span, or without one",
    "text behind a span",
    "start of a span",
    "first placeholder, forced",
    "latents, one slot late",
)


def kind_of(trajectory: Trajectory, place: int, tokens: LatentTokens) -> str:
    """Which of `KINDS` the slot at `place` of a completion is."""
    ids = trajectory.completion_ids
    if place and ids[place - 1] == tokens.filler:
        return KINDS[4]
    if ids[place] == tokens.filler:
        return KINDS[3]
    if ids[place] == tokens.start:
        return KINDS[2]
    return KINDS[1] if tokens.end in ids[:place] else KINDS[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("policy")
    parser.add_argument("manifest")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--kappa", type=float, default=0.01)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    policy = load_policy(options.policy)
    media = MediaProcessor(AutoProcessor.from_pretrained(options.policy))
    clips = LocalMedia(media, 1.0)
    sampling = Sampling(1.0, 32)
    requests = [
        RolloutRequest(sample, tuple(range(4 * i, 4 * i + 4)), sampling)
        for i, sample in enumerate(read_manifest(options.manifest, limit=options.prompts))
    ]
    groups = TransformersEngine(policy, media, clips).generate(requests)
    rows = [trajectory for group in groups for trajectory in group]
    published = replay_published(policy, collate_published(rows, policy, clips), options.kappa)
    exact = replay(policy, collate(rows, policy, clips), policy)
    advantages = torch.randn(len(rows), generator=torch.Generator().manual_seed(0))
    places = defaultdict(list)
    for row, t in enumerate(rows):
        for place in range(len(t.completion_ids)):
            places[kind_of(t, place, policy.latent_tokens)].append((row, place))
    tokens = sum(len(t.completion_ids) for t in rows)
    weights = [p for p in policy.parameters() if p.requires_grad]

    def pull(logprobs: torch.Tensor, at: tuple[torch.Tensor, ...]) -> float:
        loss = (advantages[at[0]] * logprobs[at]).sum() / tokens
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        return float(torch.cat([g.flatten() for g in found if g is not None]).norm())

    print("| slots | number | log-prob, published | exact | gradient, published | exact |")
    print("|---|--:|--:|--:|--:|--:|")
    for kind in KINDS:
        if not (found := places[kind]):
            continue
        at = tuple(torch.tensor(found).T)
        means = [float(scores.logprobs[at].detach().mean()) for scores in (published, exact)]
        pulls = [pull(scores.logprobs, at) for scores in (published, exact)]
        print(
            f"| {kind} | {len(found)} | {means[0]:.2f} | {means[1]:.2f} "
            f"| {pulls[0]:.3f} | {pulls[1]:.3f} |"
        )


if __name__ == "__main__":
    main()
