"""The tiny Qwen3-VL made from nothing: its tokenizer, its processor, its weights."""

import re
from typing import Any

import decord
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from recipes.quickstart import checkpoint, texts, world
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor

TOKENIZER = checkpoint.make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.make_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return Qwen3VLForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    world.write_world(folder := tmp_path_factory.mktemp("clips"), "train", 1, seed=0)
    return decord.VideoReader(str(folder / "train/00001.mp4")).get_batch(range(16)).asnumpy()


def prepare(processor, frames, question):
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    clip = VideoMetadata(total_num_frames=16, fps=2.0, frames_indices=list(range(len(frames))))
    return processor(
        text=[text],
        videos=[frames],
        video_metadata=[clip],
        do_sample_frames=False,
        return_tensors="pt",
    ).convert_to_tensors("pt")


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_each_word_is_one_token_after_saving_and_loading(processor):
    tokenizer = processor.tokenizer
    for words in (
        texts.cells(),
        texts.COLOURS,
        (texts.WHERE, texts.TILE, texts.READ, texts.NEXT),
        texts.COLUMNS,
    ):
        for word in words:
            assert len(tokenizer.tokenize(word)) == 1, word
    chain = "where r2c3 tile r1c4 blue read<|video_pad|> r3c3 next<|video_pad|> r4c2"
    assert len(tokenizer.tokenize(chain)) == 11
    assert tokenizer.tokenize("<0.2 seconds>") == ["<0.2", "Ġseconds>"]
    assert tokenizer.tokenize(texts.answer("B")) == ["<answer>", "B", "</answer>"]
    lengths = [len(tokenizer.tokenize(question)) for question in texts.QUESTIONS]
    assert lengths == [len(re.findall(r"\S+", question)) for question in texts.QUESTIONS] == [6, 6]


def test_answer_tags_survive_decoding_without_special_tokens(processor):
    ids = processor.tokenizer(texts.answer("C") + "<|im_end|>")["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "<answer>C</answer>"


def test_latent_tokens_fit_into_the_spare_embeddings(processor, model):
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 32 == 0 and rows >= len(processor.tokenizer) + checkpoint.SPARE_ROWS
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("question", texts.QUESTIONS)
def test_a_prompt_is_short_and_frames_go_in_as_they_are(processor, frames, question):
    assert isinstance(processor, Qwen3VLProcessor)
    inputs = prepare(processor, frames[:4], question)
    assert inputs["input_ids"].shape == (1, 54)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == 32
    assert inputs["video_grid_thw"].tolist() == [[2, 8, 8]]
    # patches: time, then tiles, then the 2x2 patches of a tile; in each: channel, frame, row,
    # column
    patches = inputs["pixel_values_videos"].view(2, 4, 4, 2, 2, 3, 2, 4, 4)
    restored = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(4, 32, 32, 3) * 127.5 + 127.5
    assert torch.allclose(restored, torch.tensor(frames[:4]).float(), atol=1e-3)


def test_a_manifest_row_becomes_the_same_prompt_by_the_way_of_the_data(processor, tmp_path):
    sample = read_manifest(world.write_world(tmp_path, "rl", 1, seed=0))[0]
    media = MediaProcessor(processor)
    clip = media.process(media.key(sample))
    prompt = media.encode(sample, [clip])
    drawn = world.draw_clip(0, "rl", 0)
    frames = world.render(drawn.board, drawn.path).repeat(2, axis=0)[:4]
    direct = prepare(processor, frames, sample.question)
    assert prompt.input_ids.tolist() == direct["input_ids"][0].tolist()
    difference = clip.inputs["pixel_values_videos"] - direct["pixel_values_videos"]
    assert difference.abs().max() <= 2 / 127.5
    assert sample.extra["path"] == drawn.path.tolist() and sample.answer == drawn.answer


def test_all_frames_of_a_clip_go_in_unresized_too(processor, frames):
    assert prepare(processor, frames, "x")["video_grid_thw"].tolist() == [[8, 8, 8]]
    assert prepare(processor, frames[2:4], "x")["video_grid_thw"].tolist() == [[1, 8, 8]]


def test_the_model_runs_and_stops_at_its_end_token(processor, model, frames):
    inputs = prepare(processor, frames[:4], texts.QUESTIONS[0])
    logits = model(**inputs).logits
    assert logits.shape == (1, 54, model.config.text_config.vocab_size) and logits.isfinite().all()
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    features = torch.cat(
        model.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
    )
    assert features.shape == (32, 64)


def test_weights_follow_the_seed_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    one, same, other = (checkpoint.make_model(TOKENIZER, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same.state_dict().keys() == one.state_dict().keys()
    for name, weights in one.state_dict().items():
        constant = bool((weights == weights.flatten()[0]).all())  # norms and biases
        assert torch.equal(weights, same.state_dict()[name]), name
        assert torch.equal(weights, other.state_dict()[name]) == constant, name
    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    spread = [one.state_dict()[name].std().item() for name in names]
    assert spread == pytest.approx([0.5, 0.08], rel=0.05)
