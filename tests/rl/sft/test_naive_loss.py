"""The losses of SFT against a loop that goes one position at a time through the model's own
forward: no packing, no cache, no pooling layer, and the protocol's rules written out once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from rl.data import MediaProcessor, read_manifest
from rl.data.media import LocalMedia
from rl.data.video import read_frames
from rl.policy.heads import HeadConfig, HeadKind
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.scoring import media_types
from rl.sft.alignment import LatentLoss
from rl.sft.trainer import LatentSFTConfig, LatentSFTTrainer
from rl.trajectory import Sample

MIN, MAX, SPANS = 2, 5, 2


@pytest.fixture(scope="module")
def rows(clips: Path) -> list[Sample]:
    """Two spans with text before, between and behind them; and one span with text before it."""
    first, second = read_manifest(clips / "manifest.jsonl")[1:3]
    return [
        replace(first, imagine=((4, 5, 6), (6, 7)), reasoning=("up", "on", "so")),
        replace(second, reasoning=("ah", "")),
    ]


@pytest.fixture
def make(tiny_checkpoint: Path) -> Callable[..., Any]:
    def build(head: HeadKind, min_length: int) -> Any:
        torch.manual_seed(0)
        processor: Any = AutoProcessor.from_pretrained(tiny_checkpoint)
        protocol = LatentProtocol(min_length=min_length, max_length=MAX, max_spans=SPANS)
        policy = make_policy(tiny_checkpoint, processor, protocol, HeadConfig(head))
        for weight in policy.latent_head.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.2)
        return policy.eval(), MediaProcessor(processor)

    return build


def span_targets(policy: Any, media: MediaProcessor, row: Sample, tokens: Any) -> list[Any]:
    """The targets of each span, [T, H], with Python's own means."""
    spans = []
    for frames in row.imagine:
        frames = frames + frames[-1:] * (len(frames) % 2)
        if tokens == "all" and len(frames) == 4:  # 8 tokens are too many for 5: a token a pair
            pixels = torch.from_numpy(read_frames(row.video, frames)).permute(0, 3, 1, 2)
            inputs = media.processor.video_processor(
                [pixels],
                size={"shortest_edge": 1, "longest_edge": 2 * 64 * 4},
                do_sample_frames=False,
                return_tensors="pt",
            )
        else:
            inputs = media.process(media.key(row, frames)).inputs
        with torch.no_grad():
            found = policy.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"]
            ).pooler_output[0]
        patches = found.view(len(frames) // 2, -1, found.shape[-1])
        latents = []
        for patch in patches:
            runs = len(patch) if tokens == "all" else tokens
            size = len(patch) // runs
            latents += [sum(patch[i * size : (i + 1) * size]) / size for i in range(runs)]
        spans.append(torch.stack(latents))
    return spans


def naive(
    policy: Any, media: MediaProcessor, row: Sample, spans: list[Any], own: bool
) -> tuple[list[float], list[torch.Tensor], list[torch.Tensor]]:
    """The -log p of each decision, and the mean and the target of each latent."""
    tokens, tokenizer, protocol = policy.latent_tokens, media.tokenizer, policy.protocol
    pieces = [
        f"<|latent_start|>{'<|latent|>' * len(span)}<|latent_end|>{text}"
        for span, text in zip(spans, row.reasoning[1:], strict=True)
    ]
    text = f"{row.reasoning[0]}{''.join(pieces)}={row.answer}<|im_end|>"
    completion = tokenizer(text, add_special_tokens=False)["input_ids"]
    clip = media.process(media.key(row))
    ids = [*media.encode(row, [clip]).input_ids]
    costs: list[float] = []
    means: list[torch.Tensor] = []
    fed: list[torch.Tensor] = []
    targets = [*torch.cat(spans)]
    length = started = 0
    for token in completion:
        so_far = torch.tensor([ids])
        inputs = {
            "input_ids": so_far,
            "attention_mask": torch.ones_like(so_far),
            "mm_token_type_ids": media_types(so_far, policy.config),
            **clip.inputs,
            "latents": torch.stack(fed) if fed else torch.zeros(0, 32),
        }
        with torch.no_grad():
            hidden = policy.hidden_states(**inputs, use_cache=False).last_hidden_state[0, -1]
            logits = policy.lm_head(hidden).double()
        if ids[-1] in (tokens.start, tokens.filler):
            length = 0 if ids[-1] == tokens.start else length
            end = float(logits.softmax(-1)[tokens.end])
            if protocol.min_length <= length < MAX:
                costs.append(-np.log(end if token == tokens.end else 1.0 - end))
            if token == tokens.filler:
                with torch.no_grad():
                    means.append(policy.latent_head(hidden))
                fed.append(means[-1] if own else targets[len(fed)])
                length += 1
        else:
            never = [tokens.filler, tokens.end, *tokens.banned]
            logits[never + [tokens.start] * (started == SPANS)] = -torch.inf
            costs.append(-float(logits.log_softmax(-1)[token]))
            started += token == tokens.start
        ids.append(token)
    return costs, means, targets


@pytest.mark.parametrize(
    ("tokens", "lengths", "head", "latents"),
    [
        (1, (2, 1, 1), "mlp", "teacher"),
        (2, (4, 2, 2), "identity", "teacher"),
        ("all", (2, 4, 4), "identity", "teacher"),
        ("all", (2, 4, 4), "mlp", "teacher"),
        ("all", (2, 4, 4), "mlp", "own"),
    ],
)
def test_the_loss_is_that_of_a_loop(
    tokens: Any,
    lengths: tuple[int, ...],
    head: HeadKind,
    latents: str,
    make: Callable[..., Any],
    rows: list[Sample],
    tmp_path: Path,
) -> None:
    policy, media = make(head, min(MIN, *lengths))
    spans = [span_targets(policy, media, row, tokens) for row in rows]
    assert tuple(len(span) for row in spans for span in row) == lengths
    found = [
        naive(policy, media, row, targets, latents == "own")
        for row, targets in zip(rows, spans, strict=True)
    ]
    costs = [cost for row in found for cost in row[0]]
    means = torch.stack([mean for row in found for mean in row[1]])
    targets = torch.stack([target for row in found for target in row[2]])
    off = targets - targets.mean(0)
    variance = float((off * off).mean())
    gap, width = means - targets, targets.shape[-1]
    cosines = (means * targets).sum(-1) / means.norm(dim=-1) / targets.norm(dim=-1)
    wanted = {
        "mse": float((gap * gap).sum(-1).mean()) / width / variance,
        "cosine": float((1 - cosines).mean()),
    }
    source = LocalMedia(media, 8)
    for kind in get_args(LatentLoss):
        args = LatentSFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            latent_weight=0.3,
            latent_loss=kind,
            tokens_per_patch=tokens,
            latents=latents,  # type: ignore[arg-type]
            answer_template="={answer}",
            reasoning_template="{reasoning}",
        )
        trainer = LatentSFTTrainer(policy, args, rows, media, source=source)
        trainer.train()
        log = trainer.state.log_history[0]
        text = sum(costs) / len(costs)
        assert log["loss_text"] == pytest.approx(text, rel=1e-5)
        assert log["loss_latent"] == pytest.approx(wanted[kind], rel=1e-5)
        assert log["loss"] == pytest.approx(text + 0.3 * wanted[kind], rel=1e-5)
        assert log["latent_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        if latents == "own":
            assert 1 < log["own_passes"] <= max(sum(map(len, row)) for row in spans)
