"""Visual replay: what is chosen, what it is pulled to, and what the language model then sees."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.data.frames import FrameRule
from rl.data.media import MediaProcessor
from rl.errors import PolicyError
from rl.policy.depth import DepthConfig, DepthGate
from rl.policy.loading import load_policy, make_policy
from rl.policy.modules import ModulesConfig
from rl.policy.saliency import watched
from rl.policy.unroll import Unroll
from rl.policy.visual_replay import VisualReplayConfig, choose, densest_window, region_target
from rl.scoring import collate, prompt_inputs
from tests.latent import engine_for, plain_inputs, requests_for, square_samples, thinking_policy
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_processor

REPLAY = ModulesConfig(visual_replay=VisualReplayConfig(tokens=3, window=(1, 2, 2)))

# -- what is chosen, and what it is pulled to ------------------------------------------------------

tokens = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=9)


@given(tokens, st.integers(1, 12))
def test_choose_is_a_sort(values, count):
    saliency = torch.tensor([[float(s) for s, _ in values]])
    free = torch.tensor([[f for _, f in values]])
    ranked = sorted((-s, i) for i, (s, f) in enumerate(values) if f)
    expected = sorted(i for _, i in ranked[:count])
    expected += [-1] * (count - len(expected))
    assert choose(saliency, free, count).tolist() == [expected]


def test_choose_of_several_videos_by_hand():
    saliency = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.0, 0.0, 0.0], [0.2, 0.2, 0.1, 0.2]])
    free = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert choose(saliency, free, 2).tolist() == [[2, 3], [1, -1], [0, 1]]
    assert choose(saliency[:, :0], free[:, :0], 2).tolist() == [[-1, -1]] * 3


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(sizes, sizes, st.randoms(use_true_random=False))
def test_the_densest_window_is_the_first_of_the_fullest(grid, window, random):
    hits = torch.tensor([random.random() < 0.4 for _ in range(int(np.prod(grid)))]).view(*grid)
    size = [min(w, n) for w, n in zip(window, grid, strict=True)]
    places = itertools.product(*(range(n - s + 1) for n, s in zip(grid, size, strict=True)))
    boxes = [tuple(slice(a, a + s) for a, s in zip(p, size, strict=True)) for p in places]
    counts = [int(hits[box].sum()) for box in boxes]
    assert densest_window(hits, window) == boxes[counts.index(max(counts))]


def test_an_image_has_the_published_window():
    """The densest 4x4 of a grid of 10x10."""
    hits = torch.zeros(1, 10, 10, dtype=torch.bool)
    for row, column in [(3, 5), (4, 6), (5, 5), (6, 8), (0, 0), (1, 1), (9, 9)]:
        hits[0, row, column] = True
    assert densest_window(hits, (1, 4, 4)) == (slice(0, 1), slice(3, 7), slice(5, 9))
    assert VisualReplayConfig().window == (1, 4, 4)


def test_the_region_is_a_box_in_time_height_and_width():
    grid = (3, 4, 4)
    features = torch.randn(48, 5, requires_grad=True)
    # Two neighbours in time and one beside them against three that are scattered.
    places = torch.tensor([16 + 5, 32 + 5, 32 + 6, 0, 15, 3, -1, -1])
    target = region_target(features, places, grid, (2, 2, 2))
    expected = torch.stack(
        [features[16 * t + 4 * h + w] for t in (1, 2) for h in (0, 1) for w in (1, 2)]
    ).mean(0)
    torch.testing.assert_close(target, expected)
    assert not target.requires_grad
    # A clip smaller than the window is one region.
    torch.testing.assert_close(
        region_target(features[:4], torch.tensor([2]), (1, 2, 2), (1, 4, 4)), features[:4].mean(0)
    )


@pytest.mark.parametrize(
    "settings", [{"tokens": 0}, {"window": (4, 4)}, {"window": (1, 0, 4)}, {"window": (1,) * 4}]
)
def test_config_errors(settings):
    with pytest.raises(PolicyError, match="visual replay of"):
        VisualReplayConfig(**settings)


def test_a_new_module_shows_tokens_as_they_are(tmp_path):
    policy = make_policy(save_tiny_checkpoint(tmp_path), tiny_processor(), modules=REPLAY)
    shown = torch.randn(4, 32)
    found = policy.visual_replay(shown)
    assert torch.equal(found, shown)
    found.square().sum().backward()
    assert policy.visual_replay.outer.weight.grad.abs().max() > 0


# -- saliency --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_that_of_whole_attention_maps(family, tmp_path):
    replays = REPLAY if family != "qwen3_5" else None
    policy, processor = thinking_policy(tmp_path / "p", family, modules=replays)
    policy.save_pretrained(tmp_path / "saved")
    eager = load_policy(tmp_path / "saved", attn_implementation="eager").eval()
    text = policy.config.get_text_config()
    if family != "qwen2_5_vl":
        assert text.num_key_value_heads < text.num_attention_heads
    media = engine_for(policy, processor).media
    samples = square_samples(tmp_path / "clips", 3)
    encoder = MediaProcessor(processor, FrameRule(8))
    clips = [[media.get(encoder.key(sample))] for sample in samples]
    start, filler = policy.latent_tokens.start, policy.latent_tokens.filler
    prompts = [
        np.append(encoder.encode(sample, clip).input_ids, start)
        for sample, clip in zip(samples, clips, strict=True)
    ]
    inputs = prompt_inputs(policy, prompts, clips, pad=0)
    assert (inputs["attention_mask"] == 0).any()
    video = inputs["input_ids"] == policy.config.video_token_id

    def maps(inputs, latents=None):
        """Attention [B, T, T], mean over layers and heads."""
        out = eager.hidden_states(
            **inputs, latents=latents, output_attentions=True, use_cache=False
        )
        found = [a for a in out.attentions if a is not None]
        assert len(found) == (1 if family == "qwen3_5" else 2)
        return torch.stack(found).mean((0, 2))

    whole = maps(inputs)
    unroll = Unroll(policy, inputs, ask=True)
    videos = unroll.videos
    for row in range(3):
        # The question is what stands behind the last frame.
        behind = int(video[row].nonzero()[-1]) + 1
        wanted = whole[row, behind:].mean(0)[video[row]]
        torch.testing.assert_close(
            unroll.question[row, : len(wanted)],  # type: ignore[index]
            wanted,
            atol=1e-6,
            rtol=1e-4,
        )
    assert not unroll.question[~videos.real].any()  # type: ignore[index]
    if replays is None:
        return
    wanted = whole[:, -1].gather(1, videos.columns) * videos.real
    assert wanted[videos.real].min() > 0 and not unroll.saliency[~videos.real].any()
    torch.testing.assert_close(unroll.saliency, wanted, atol=1e-6, rtol=1e-4)
    # And of the tokens that follow, whatever became of the rows.
    unroll.select(torch.tensor([2, 0, 1]))
    latents = torch.randn(3, 32)
    unroll.extend(torch.tensor([[70]] * 3), latents[:0])
    unroll.extend(torch.full((3, 1), filler), latents)
    for place, row in enumerate([2, 0, 1]):
        ids = torch.cat([torch.from_numpy(prompts[row]), torch.tensor([70, filler])])[None]
        own = prompt_inputs(policy, [ids[0].numpy()], [clips[row]], pad=0)
        at = (ids[0] == policy.config.video_token_id).nonzero()[:, 0]
        torch.testing.assert_close(
            unroll.saliency[place, : len(at)],
            maps(own, latents[place : place + 1])[0, -1, at],
            atol=1e-6,
            rtol=1e-4,
        )


@torch.no_grad()
def test_second_passes_do_not_count(tmp_path):
    """Whether they run hangs on the other tokens of a batch. Here they are in the last layer, so
    no first pass knows of them.
    """
    policy, processor = thinking_policy(tmp_path / "p", modules=ModulesConfig(depth=DepthConfig()))
    engine = engine_for(policy, processor)
    (group,) = engine.generate(requests_for(square_samples(tmp_path / "clips", 1), 1))
    clips = [[engine.media.get(key) for key in group.trajectories[0].media]]
    inputs = prompt_inputs(policy, [group.trajectories[0].prompt_ids], clips, pad=0)
    (gate,) = [m for m in policy.modules() if isinstance(m, DepthGate)]
    found, hidden = [], []
    for bias in (-10.0, 10.0):
        gate.router.bias.fill_(bias)
        unroll = Unroll(policy, inputs, ask=True)
        found.append(unroll.question)
        hidden.append(unroll.hidden)
    assert (hidden[0] - hidden[1]).abs().max() > 1e-2
    assert torch.equal(found[0], found[1])


def test_who_watches_nothing_is_told():
    with watched() as found, pytest.raises(AssertionError, match="no attention was computed"):
        _ = found.last


# -- what the language model sees ------------------------------------------------------------------


def by_hand(policy, media, t):
    """Hidden states that decide at each token of a completion [C, H], from a row of embeddings put
    together one by one.
    """
    prompt = torch.from_numpy(np.array(t.prompt_ids))
    (clip,) = [media.get(key).inputs for key in t.media]
    out = policy.get_video_features(clip["pixel_values_videos"], clip["video_grid_thw"])
    video = (prompt == policy.config.video_token_id).nonzero()[:, 0]
    embed = policy.get_input_embeddings()
    embeds = list(embed(prompt))
    for place, feature in zip(video.tolist(), out.pooler_output[0], strict=True):
        embeds[place] = feature
    inputs = plain_inputs(policy, media, t, len(prompt))
    positions, behind = policy.position_ids(inputs)
    positions = list(positions[:, 0].T)
    deciding, latent = [], 0
    last = len(embeds) - 1
    for number, token in enumerate(t.completion_ids.tolist()):
        deciding.append(last)
        vector = embed(torch.tensor(token))
        if token == t.filler:
            for source in t.replayed[latent]:
                if source >= 0:
                    feature = out.pooler_output[0][source]
                    embeds.append(policy.visual_replay(feature))
                    positions.append(positions[video[source]])
            vector = t.latents[latent]
            latent += 1
        last = len(embeds)
        embeds.append(vector)
        positions.append(behind.expand(3) + number)
    rows = torch.stack(embeds)[None]
    extra = {}
    if getattr(out, "deepstack_features", None) is not None:
        mask = torch.zeros(rows.shape[:2], dtype=torch.bool)
        mask[0, video] = True
        extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": out.deepstack_features}
    hidden = policy.get_decoder()(
        inputs_embeds=rows,
        position_ids=torch.stack(positions, 1)[:, None],
        attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
        use_cache=False,
        **extra,
    )
    return hidden.last_hidden_state[0, deciding]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_packed_row_is_its_sequences_put_together_by_hand(family, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", family, modules=REPLAY)
    engine = engine_for(policy, processor)
    groups = engine.generate(requests_for(square_samples(tmp_path / "clips")))
    rows = [t for group in groups for t in group]
    shown = [len(r[r >= 0]) for r in (t.replayed for t in rows)]  # type: ignore[index]
    assert max(shown) > 3 and min(shown) == 0
    batch = collate(rows, policy, engine.media)
    slots = batch.inputs["slots"]
    found = []
    hook = policy.get_decoder().register_forward_hook(
        lambda _module, _args, out: found.append(out.last_hidden_state[0])
    )
    scores = policy(**batch.inputs)
    hook.remove()
    hands = [by_hand(policy, engine.media, t) for t in rows]
    decided = torch.cat([h[t.decision != 0] for h, t in zip(hands, rows, strict=True)])
    torch.testing.assert_close(found[0][slots.rows], decided, atol=2e-5, rtol=1e-4)
    latent = torch.cat([h[t.completion_ids == t.filler] for h, t in zip(hands, rows, strict=True)])
    torch.testing.assert_close(scores.means, policy.latent_head(latent), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_engine_shows_what_is_salient(family, tmp_path):
    """What was shown again is what `choose` takes by whole attention maps, latent by latent."""
    policy, processor = thinking_policy(tmp_path / "p", family, modules=REPLAY)
    engine = engine_for(policy, processor)
    groups = engine.generate(requests_for(square_samples(tmp_path / "clips"), 2))
    checked = 0
    for t in (t for group in groups for t in group if len(t.latents)):
        clips = [[engine.media.get(key) for key in t.media]]
        unroll = Unroll(policy, prompt_inputs(policy, [t.prompt_ids], clips, pad=0))
        shown = []
        latents = iter(t.latents)
        for token in t.completion_ids.tolist():
            is_latent = token == t.filler
            if is_latent:
                taken = {i for row in shown for i in row if i >= 0}
                ranked = unroll.saliency[0].argsort(descending=True).tolist()
                best = sorted([i for i in ranked if i not in taken][:3])
                shown.append(best + [-1] * (3 - len(best)))
                checked += 1
            fed = next(latents)[None] if is_latent else t.latents[:0]
            unroll.feed(torch.tensor([token]), fed)
        assert t.replayed.tolist() == shown  # type: ignore[union-attr]
    assert checked > 5
