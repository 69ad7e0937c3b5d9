"""Sequences that grow side by side, against one pass over each of them alone."""

import itertools
from typing import Any

import pytest
import torch

from rl.policy.modules import ModulesConfig
from rl.policy.unroll import Unroll
from rl.scoring import prompt_inputs
from rollouts.assemble import clip_of
from tests.latent import engine_for, square_samples, thinking_policy
from tests.rl.policy.test_modules import PARTS
from tests.tiny import FAMILIES

STEPS = 6


class World:
    """A policy, three prompts of different lengths, and what follows them: B rows of tokens, of
    which some are latents.
    """

    def __init__(self, folder, family, names=()):
        modules = ModulesConfig(**{name: PARTS[name] for name in names})
        self.policy, processor = thinking_policy(folder / "p", family, modules=modules)
        engine = engine_for(self.policy, processor)
        samples = square_samples(folder / "clips", 3)
        self.clips = [[clip_of(engine.processor, engine.media, s)] for s in samples]
        self.prompts = [
            engine.processor.encode(s, c).input_ids
            for s, c in zip(samples, self.clips, strict=True)
        ]
        torch.manual_seed(0)
        start, filler = self.policy.latent_tokens.start, self.policy.latent_tokens.filler
        self.ids = torch.tensor(
            [
                [start, filler, filler, 70, 71, 72],
                [75, start, filler, 76, filler, filler],
                [filler, 80, 81, filler, 82, start],
            ]
        )
        self.latents = torch.randn(3, STEPS, 32)
        self.inputs = prompt_inputs(self.policy, self.prompts, self.clips, pad=0)
        assert (self.inputs["attention_mask"] == 0).any(1).sum() == 2

    def fed(self, ids, rows):
        """The latents of a part of `ids`, in row-major order, as `ids` [B, n] say."""
        return rows[ids == self.policy.latent_tokens.filler]

    def alone(self, row, ids, latents):
        """Hidden states [n, H] of `ids` [n] behind a prompt, from one pass over all of it."""
        prompt = torch.from_numpy(self.prompts[row])
        whole = torch.cat([prompt, ids])[None]
        clip = self.clips[row][0].inputs
        inputs = {
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
            "mm_token_type_ids": 2 * (whole == self.policy.config.video_token_id).long(),
            **clip,
        }
        out = self.policy.hidden_states(**inputs, latents=self.fed(ids, latents), use_cache=False)
        return out.last_hidden_state[0, len(prompt) - 1 :]

    def grown(self, unroll, ids, latents, cuts):
        """Hidden states [B, n, H] of `ids` [B, n], taken in between `cuts`."""
        found = [unroll.hidden[:, None]]
        for a, b in itertools.pairwise(cuts):
            part = ids[:, a:b]
            fed = self.fed(part, latents[:, a:b])
            found.append(unroll.extend(part, fed))
        return torch.cat(found, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = {}

    def make(family, names=()):
        if (family, names) not in made:
            made[family, names] = World(tmp_path_factory.mktemp(family), family, names)
        return made[family, names]

    return make


close: Any = {"atol": 2e-5, "rtol": 1e-4}
BOTH = ("injection", "depth")


@torch.no_grad()
@pytest.mark.parametrize("names", [(), BOTH], ids=["plain", "modules"])
@pytest.mark.parametrize("family", FAMILIES)
def test_growing_is_one_pass_over_the_whole(family, names, world):
    w = world(family, names)
    unroll = Unroll(w.policy, w.inputs, tail=2)
    assert torch.equal(unroll.tail[:, -1], unroll.hidden)
    expected = torch.stack([w.alone(i, w.ids[i], w.latents[i]) for i in range(3)])
    found = [unroll.hidden]
    for step in range(STEPS):
        unroll.feed(w.ids[:, step], w.fed(w.ids[:, step], w.latents[:, step]))
        found.append(unroll.hidden)
    torch.testing.assert_close(torch.stack(found, 1), expected, **close)
    again = w.grown(Unroll(w.policy, w.inputs), w.ids, w.latents, [0, 1, 4, STEPS])
    torch.testing.assert_close(again, expected, **close)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_chosen_repeated_and_dropped(family, world):
    w = world(family, BOTH)
    unroll = Unroll(w.policy, w.inputs)
    w.grown(unroll, w.ids[:, :3], w.latents[:, :3], [0, 1, 3])
    rows = torch.tensor([2, 0, 0])
    unroll.select(rows)
    ids, latents = w.ids[rows].clone(), w.latents[rows].clone()
    ids[2, 3:] = torch.tensor([90, w.policy.latent_tokens.filler, 91])  # twins part
    found = w.grown(unroll, ids[:, 3:], latents[:, 3:], [0, 2, 3])
    for i, row in enumerate(rows.tolist()):
        expected = w.alone(row, ids[i], latents[i])[3:]
        torch.testing.assert_close(found[i], expected, **close)
    seen = unroll.means(torch.tensor([2, 1]))
    torch.testing.assert_close(seen, unroll.means()[[2, 1]], **close)
    unroll.select(torch.tensor([1]))
    unroll.extend(ids[1:2, :1], latents[:0, 0])
    whole = torch.cat([ids[1], ids[1, :1]]), torch.cat([latents[1], latents[1, :1]])
    torch.testing.assert_close(unroll.hidden[0], w.alone(0, *whole)[-1], **close)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_a_row_moves_nothing(family, world):
    w = world(family)
    unroll = Unroll(w.policy, w.inputs)
    w.grown(unroll, w.ids[:, :2], w.latents[:, :2], [0, 2])
    ids = w.ids[:, 2:].clone()
    lengths = [1, 4, 2]
    real = torch.arange(4) < torch.tensor(lengths)[:, None]
    ids[~real] = 0
    found = unroll.extend(ids, w.fed(ids, w.latents[:, 2:]), real=real)
    for i, length in enumerate(lengths):
        expected = w.alone(i, w.ids[i, : 2 + length], w.latents[i, : 2 + length])[3:]
        torch.testing.assert_close(found[i, :length], expected, **close)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_streams_do_not_disturb_each_other(family, grad, world):
    w = world(family, BOTH)
    with torch.set_grad_enabled(grad):
        unroll = Unroll(w.policy, w.inputs)
        w.grown(unroll, w.ids[:, :1], w.latents[:, :1], [0, 1])
        other = unroll.detached()
        assert not other.hidden.requires_grad
        ids = w.ids.flip(1)
        theirs = torch.cat([w.ids[:, :1], ids], 1), torch.cat([w.latents[:, :1], w.latents], 1)
        with torch.no_grad():
            first = w.grown(other, ids[:, :3], w.latents[:, :3], [0, 1, 2, 3])
        ours = w.grown(unroll, w.ids[:, 1:], w.latents[:, 1:], [0, 1, 2, 3, 5])
        with torch.no_grad():
            last = w.grown(other, ids[:, 3:], w.latents[:, 3:], [0, 1, 3])
            expected = [w.alone(i, theirs[0][i], theirs[1][i])[1:] for i in range(3)]
        torch.testing.assert_close(
            torch.cat([first, last[:, 1:]], 1), torch.stack(expected), **close
        )
        expected = [w.alone(i, w.ids[i], w.latents[i])[1:] for i in range(3)]
    torch.testing.assert_close(ours, torch.stack(expected), **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_pass(family, world):
    w = world(family, BOTH)
    weights = torch.randn(3, STEPS + 1, 32)

    def gradients(states, latents):
        w.policy.zero_grad()
        loss = (states * weights).sum()
        loss.backward()
        named = w.policy.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None} | {"z": latents.grad}

    latents = w.latents.clone().requires_grad_()
    whole = torch.stack([w.alone(i, w.ids[i], latents[i]) for i in range(3)])
    expected = gradients(whole, latents)
    latents = w.latents.clone().requires_grad_()
    unroll = Unroll(w.policy, w.inputs)
    found = gradients(w.grown(unroll, w.ids, latents, [0, 1, 2, 5, STEPS]), latents)
    assert found.keys() == expected.keys() and any("visual" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=5e-4, rtol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_video_tokens_of_prompts(family, world):
    w = world(family, BOTH)
    unroll = Unroll(w.policy, w.inputs)
    videos = unroll.videos
    token = w.policy.config.video_token_id
    for row, clip in enumerate(w.clips):
        at = (w.inputs["input_ids"][row] == token).nonzero()[:, 0]
        count = len(at)
        assert videos.real[row].tolist() == [i < count for i in range(videos.real.shape[1])]
        assert videos.columns[row, :count].tolist() == at.tolist()
        tensors = clip[0].inputs
        features = w.policy.get_video_features(
            tensors["pixel_values_videos"], tensors["video_grid_thw"]
        ).pooler_output[0]
        torch.testing.assert_close(videos.features[row, :count], features)
        positions, _ = w.policy.position_ids(
            {
                "input_ids": torch.from_numpy(w.prompts[row])[None],
                "attention_mask": torch.ones(1, len(w.prompts[row]), dtype=torch.long),
                "mm_token_type_ids": 2 * torch.from_numpy(w.prompts[row] == token).long()[None],
                **tensors,
            }
        )
        own = torch.from_numpy(w.prompts[row] == token)
        assert torch.equal(videos.positions[:, row, :count], positions[:, 0, own])
    assert torch.equal(videos.free, videos.real)
