"""Latent self-forcing against a loop that computes everything anew for each latent."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from rl.errors import DataError
from rl.policy.protocol import LatentProtocol
from rl.policy.unroll import Unroll
from rl.scoring import collate, prompt_inputs
from rl.sft.self_forcing import alignment_loss, diversity_loss, segments, self_forced
from rl.trajectory import Sampling
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.rl.policy.test_modules import COMBINATIONS, modules
from tests.tiny import FAMILIES

PROTOCOL = LatentProtocol(min_length=4, max_length=4, max_spans=1)


@pytest.fixture
def taught(tmp_path):
    """A policy, and rows of one span of its own greedy latents."""

    def make(family: Any = "qwen3_vl", parts: Any = None) -> Any:
        policy, processor = thinking_policy(tmp_path / "p", family, PROTOCOL, modules=parts)
        engine = engine_for(policy, processor)
        sampling = Sampling(0.0, 9, imagine="always")
        groups = engine.generate(requests_for(square_samples(tmp_path / "clips"), 1, sampling))
        rows = [t for group in groups for t in group]
        return policy, engine.media, rows

    return make


def blank(rows):
    """The rows as they are taught: nobody knows their latents, nor what is shown again."""
    return [
        dataclasses.replace(t, latents=torch.zeros_like(t.latents), replayed=None) for t in rows
    ]


def forced(policy, rows, media, steps=None, align_to: Any = "segments"):
    return self_forced(policy, rows, media, steps=steps, align_to=align_to)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def objective(logprobs, latents, targets, count):
    """The loss, term by term and latent by latent."""
    align = diverse = 0.0
    rows = latents.split(count)
    for row, target in zip(rows, targets, strict=True):
        for z, v in zip(row, target, strict=True):
            align = align + (1 - cosine_similarity(z, v, dim=0)) / len(latents)
        for i, j in itertools.permutations(range(count), 2):
            cosine = cosine_similarity(row[i], row[j], dim=0)
            diverse = diverse + cosine**2 / (len(rows) * count * (count - 1))
    return -logprobs.sum() + align + diverse


def naive(policy, rows, media, steps):
    """Every latent from a pass over whole rows, without a cache."""
    batch = collate(rows, policy, media)
    order = batch.inputs["slots"].latent_rows.argsort()
    count = len(rows[0].latents)
    fed = torch.zeros(len(rows), count, policy.config.get_text_config().hidden_size)
    means = fed
    for k in range(count):
        scores = policy(**{**batch.inputs, "latents": fed.flatten(0, 1)[order]})
        means = scores.means.view_as(fed)
        z = means[:, k] if k >= count - steps else means[:, k].detach()
        fed = torch.cat([fed[:, :k], z[:, None], fed[:, k + 1 :]], 1)
    scores = policy(**{**batch.inputs, "latents": fed.flatten(0, 1)[order]})
    return scores.logprobs, scores.means


def naive_targets(policy, rows, media, count):
    found = []
    for row in rows:
        clip = media.get(row.media[0]).inputs
        features = policy.get_video_features(
            clip["pixel_values_videos"], clip["video_grid_thw"]
        ).pooler_output[0]
        frames = int(clip["video_grid_thw"][0, 0])
        per_frame = features.view(frames, -1, features.shape[-1]).mean(1).detach()
        found.append(
            torch.stack(
                [
                    per_frame[k * frames // count : -(-(k + 1) * frames // count)].mean(0)
                    for k in range(count)
                ]
            )
        )
    return found


@pytest.mark.parametrize(("family", "names"), [(f, ()) for f in FAMILIES] + COMBINATIONS)
def test_it_makes_the_latents_that_generation_makes(family, names, taught):
    policy, media, rows = taught(family, modules(names))
    for steps in (None, 1):
        found = forced(policy, blank(rows), media, steps)
        latents = torch.cat([t.latents for t in rows])
        torch.testing.assert_close(found.scores.means, latents, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            expected = policy(**collate(rows, policy, media).inputs)
        torch.testing.assert_close(found.scores.logprobs, expected.logprobs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "names"),
    [(f, ()) for f in FAMILIES]
    + [("qwen3_vl", ("injection", "depth", "visual_replay")), ("qwen3_5", ("injection", "depth"))],
)
def test_gradients_are_those_of_a_naive_loop(family, names, steps, taught):
    policy, media, rows = taught(family, modules(names))
    count = len(rows[0].latents)
    found = forced(policy, blank(rows), media, steps)
    loss = -found.scores.logprobs.sum() + found.align + found.diversity
    ours = gradients(policy, loss)
    logprobs, latents = naive(policy, rows, media, steps)
    expected = objective(logprobs, latents, naive_targets(policy, rows, media, count), count)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    theirs = gradients(policy, expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-4, rtol=2e-3, msg=name)


# -- the terms, by hand ----------------------------------------------------------------------------


def test_alignment_and_diversity_by_hand():
    latents = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, -1.0]]])
    targets = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    # Cosines 0.6, 1, 1 and -1.
    assert alignment_loss(latents, targets).item() == pytest.approx((0.4 + 0 + 0 + 2) / 4)
    # Within the rows 0.6² and (-1)², either way round.
    assert diversity_loss(latents).item() == pytest.approx((0.36 + 1) / 2)
    assert diversity_loss(latents[:, :1]).item() == 0.0


def test_segments_by_hand():
    # Four frames of 1 x 2 tokens, whose means are 0, 1, 2 and 3; a shorter video beside it.
    tokens = torch.tensor([-1.0, 1, 0, 2, 1, 3, 2, 4])[:, None].expand(8, 3)
    short = torch.cat([tokens[4:], torch.full((4, 3), torch.nan)])
    features, grids = torch.stack([tokens, short]), [(4, 1, 2), (2, 1, 2)]
    assert segments(features, grids, 2)[:, :, 0].tolist() == [[0.5, 2.5], [2.0, 3.0]]
    # Three segments of four frames overlap; four of two frames repeat.
    assert segments(features, grids, 3)[0, :, 0].tolist() == [0.5, 1.5, 2.5]
    assert segments(features, grids, 4)[1, :, 0].tolist() == [2.0, 2.0, 3.0, 3.0]
    # Only the second token of each frame counts, and the last frame thrice.
    weights = torch.tensor([[0.0, 1, 0, 1, 0, 1, 0, 3]] * 2)
    weighted = segments(features[:1], grids[:1], 2, weights)[0, :, 0]
    torch.testing.assert_close(weighted, torch.tensor([1.5, (3 + 3 * 4) / 4]))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
def test_segments_cover_a_video_in_order(frames, tokens, count):
    times = torch.arange(frames).float().repeat_interleave(tokens)[None, :, None]
    (found,) = segments(times, [(frames, 1, tokens)], count)[..., 0]
    assert (found.diff() >= 0).all()
    assert found.min() >= 0 and found.max() <= frames - 1
    if count >= frames:
        assert found[0] == 0 and found[-1] == frames - 1
    assert found.mean().item() == pytest.approx((frames - 1) / 2, abs=1e-5)


def test_the_question_weighs_the_segments(taught):
    policy, media, rows = taught()
    by_time, by_question = (
        forced(policy, blank(rows), media, align_to=to) for to in ("segments", "question")
    )
    assert by_time.align.item() != pytest.approx(by_question.align.item(), abs=1e-6)
    found = []
    for row in rows:
        prompt = np.append(row.prompt_ids, policy.latent_tokens.start)
        clip = media.get(row.media[0])
        unroll = Unroll(policy, prompt_inputs(policy, [prompt], [[clip]], 0), ask=True)
        frames, height, width = clip.inputs["video_grid_thw"][0].tolist()
        target = segments(
            unroll.videos.features, [(frames, height // 2, width // 2)], 4, unroll.question
        )
        found.append(alignment_loss(row.latents[None], target))
    assert by_question.align.item() == pytest.approx(torch.stack(found).mean().item(), abs=1e-5)
    torch.testing.assert_close(by_time.scores.means, by_question.scores.means)


def test_shown_tokens_are_pulled_to_their_region(taught):
    policy, media, rows = taught(parts=modules(("visual_replay",)))
    found = forced(policy, blank(rows), media)
    errors = []
    for row in rows:
        clip = media.get(row.media[0]).inputs
        pixels, grid = clip["pixel_values_videos"], clip["video_grid_thw"]
        features = policy.get_video_features(pixels, grid).pooler_output[0]
        frames, height, width = grid[0, 0].item(), grid[0, 1].item() // 2, grid[0, 2].item() // 2
        for places in row.replayed:
            hits = {divmod(p, height * width) for p in places[places >= 0].tolist()}
            best, region = -1, []
            for t, y, x in itertools.product(range(frames), range(height - 1), range(width - 1)):
                inside = [(y + a) * width + x + b for a in (0, 1) for b in (0, 1)]
                score = sum((t, p) in hits for p in inside)
                if score > best:
                    best, region = score, [t * height * width + p for p in inside]
            if hits:
                shown = policy.visual_replay(features[places[places >= 0]]).mean(0)
                errors.append((shown - features[region].mean(0).detach()).square().mean())
    latents = sum(len(row.latents) for row in rows)
    assert len(errors) < latents  # the small clips are used up before their last latents
    assert found.replay.item() == pytest.approx(sum(e.item() for e in errors) / latents, rel=1e-4)
    grads = gradients(policy, found.replay)
    assert grads["visual_replay.outer.weight"].abs().max() > 0


def test_rows_of_different_lengths_and_without_latents(taught):
    policy, media, rows = taught(parts=modules(("injection", "depth")))
    policy.set_protocol(dataclasses.replace(policy.protocol, min_length=1))
    tokens: Any = policy.latent_tokens

    def shorter(t, count):
        text = [i for i in t.completion_ids.tolist() if i not in (tokens.start, tokens.end)]
        text = [i for i in text if i != tokens.filler]
        span = [tokens.start, *[tokens.filler] * count, tokens.end] if count else []
        ids = np.array(span + text)
        trace = policy.protocol.trace(ids, tokens)
        return dataclasses.replace(
            t,
            completion_ids=ids,
            decision=trace.slots,
            logprobs=np.zeros(len(ids), np.float32),
            kept=np.zeros(len(ids), np.int32),
            latents=torch.zeros(count, 32),
            latent_logprobs=np.zeros(count),
            span_lengths=trace.span_lengths,
            sampling=Sampling(),
        )

    mixed = [shorter(t, count) for t, count in zip(rows, (2, 0, 3, 2), strict=True)]
    together = forced(policy, mixed, media)
    alone = [forced(policy, [row], media) for row in mixed]
    torch.testing.assert_close(
        together.scores.logprobs.sum(), sum(found.scores.logprobs.sum() for found in alone)
    )
    counts = torch.tensor([2.0, 0, 3, 2])
    align = torch.stack([found.align for found in alone])
    torch.testing.assert_close(together.align, (align * counts).sum() / 7)
    assert together.scores.means.shape == (7, 32) and len(together.neighbours) == 1 + 2 + 1
    # Tokens count, and padding does not.
    counts = torch.tensor([float(len(t.prompt_ids) + len(t.completion_ids)) for t in mixed])
    shares = torch.stack([found.scores.depth for found in alone])  # type: ignore[arg-type]
    torch.testing.assert_close(together.scores.depth, (shares * counts).sum() / counts.sum())


def test_what_it_refuses(taught):
    policy, media, rows = taught()
    policy.set_protocol(dataclasses.replace(policy.protocol, max_spans=2))
    tokens = policy.latent_tokens
    ids = rows[0].completion_ids
    inner = np.concatenate([[5], ids[:6]])  # text, and then the span
    trace = policy.protocol.trace(inner, tokens)
    late = dataclasses.replace(
        blank(rows)[0],
        completion_ids=inner,
        decision=trace.slots,
        logprobs=np.zeros(len(inner), np.float32),
        kept=np.zeros(len(inner), np.int32),
        sampling=Sampling(),
    )
    with pytest.raises(DataError, match=r"'square0': self-forcing takes one latent span, at the"):
        forced(policy, [late], media)
