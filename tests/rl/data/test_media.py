from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from rl.data import FrameRule, LocalMedia, MediaProcessor, read_clip, read_frames, read_manifest
from rl.data.media import question_text
from rl.data.store import ByteCache
from rl.errors import DataError, PolicyError, RecipeError, VideoError
from rl.trajectory import MediaKey, Sample
from tests.tiny import FAMILIES, Family, moving_square, tiny_model, tiny_processor, write_clip


@pytest.fixture(scope="module")
def samples(clips: Path) -> list[Sample]:
    return read_manifest(clips / "manifest.jsonl")


def whole_call(processor: Any, sample: Sample, indices: list[int]) -> dict[str, torch.Tensor]:
    """What one call of the transformers processor gives for the clip at `indices` and the
    question.
    """
    frames, info = read_clip(sample.video, indices)
    content = [{"type": "video"}, {"type": "text", "text": question_text(sample)}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    metadata = VideoMetadata(total_num_frames=info.frames, fps=info.fps, frames_indices=indices)
    return processor(
        text=[text],
        videos=[frames],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("indices", [(0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 6, 7), (0, 4)])
def test_equals_one_call_of_the_processor(
    samples: list[Sample], family: Family, indices: tuple[int, ...]
) -> None:
    processor = MediaProcessor(tiny_processor(family))
    sample = replace(samples[1], frames=indices)
    media = processor.process(processor.key(sample))
    prompt = processor.encode(sample, [media])
    expected = whole_call(processor.processor, sample, list(indices))

    np.testing.assert_array_equal(prompt.input_ids, expected["input_ids"][0])
    np.testing.assert_array_equal(prompt.mm_token_type_ids, expected["mm_token_type_ids"][0])
    assert prompt.input_ids.dtype == prompt.mm_token_type_ids.dtype == np.int64
    tensors = set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    assert set(media.inputs) == tensors
    for name in tensors:
        assert media.inputs[name].dtype == expected[name].dtype
        torch.testing.assert_close(media.inputs[name], expected[name], rtol=0, atol=0)
    assert media.inputs["pixel_values_videos"].dtype == torch.float32
    assert media.timestamps == tuple(i / 8 for i in indices)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_takes_it(samples: list[Sample], family: Family) -> None:
    processor = MediaProcessor(tiny_processor(family))
    media = processor.process(processor.key(samples[1]))
    prompt = processor.encode(samples[1], [media])
    ids, types = torch.from_numpy(prompt.input_ids), torch.from_numpy(prompt.mm_token_type_ids)
    model = tiny_model(family)
    with torch.no_grad():
        seen = model(input_ids=ids[None], mm_token_type_ids=types[None], **media.inputs).logits
        other = media.inputs | {"pixel_values_videos": -media.inputs["pixel_values_videos"]}
        changed = model(input_ids=ids[None], mm_token_type_ids=types[None], **other).logits
    assert seen.shape == (1, len(ids), len(processor.tokenizer))
    assert seen.isfinite().all()
    assert (seen - changed)[0, -1].abs().max() > 0.01  # the answer depends on the pixels


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_number_of_frames(samples: list[Sample], family: Family) -> None:
    processor = MediaProcessor(tiny_processor(family))
    sample = replace(samples[1], frames=(0, 2, 4))
    key = processor.key(sample)
    media = processor.process(key)
    prompt = processor.encode(sample, [media])
    assert media.inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert (prompt.mm_token_type_ids == 2).sum() == 8
    assert media.key == key and media.key.frames == (0, 2, 4)
    expected = whole_call(processor.processor, sample, [0, 2, 4])
    np.testing.assert_array_equal(prompt.input_ids, expected["input_ids"][0])


def test_timestamps_in_the_prompt_are_the_file_s(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor())
    media = processor.process(processor.key(samples[1], frames=(4, 5, 6, 7)))
    # 8 frames a second: the pairs lie around 4.5/8 and 6.5/8 seconds, 4 tokens each.
    pair = f"<|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>"
    assert media.placeholder == f"<0.6 seconds>{pair}<0.8 seconds>{pair}"


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_frames_are_shown_under_the_times_of_the_ordered_ones(
    samples: list[Sample], family: Family
) -> None:
    processor = MediaProcessor(tiny_processor(family))
    ordered, shuffled = (
        processor.process(processor.key(samples[3], frames=frames))
        for frames in [(0, 2, 5, 7), (7, 0, 5, 2)]
    )
    assert shuffled.key.frames == (7, 0, 5, 2)
    assert shuffled.placeholder == ordered.placeholder
    assert shuffled.timestamps == ordered.timestamps == (0.0, 0.25, 0.625, 0.875)
    for name in ordered.inputs.keys() - {"pixel_values_videos"}:
        torch.testing.assert_close(shuffled.inputs[name], ordered.inputs[name], rtol=0, atol=0)
    pixels, same_pixels = (
        shuffled.inputs["pixel_values_videos"],
        processor.process_frames(
            [read_frames(samples[3].video, (7, 0, 5, 2))], 8.0, [(0, 2, 5, 7)]
        )["pixel_values_videos"],
    )
    torch.testing.assert_close(pixels, same_pixels, rtol=0, atol=0)  # in the order of the key
    assert (pixels - ordered.inputs["pixel_values_videos"]).abs().max() > 0.1


def test_seconds_per_grid_are_those_of_the_frames_shown(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor("qwen2_5_vl"))
    # Two frames a grid step at 8 frames a second, though the file goes on after the frames shown.
    prefix = processor.process(processor.key(samples[3], frames=(0, 1, 2, 3)))
    assert prefix.inputs["second_per_grid_ts"].tolist() == [0.25]
    spread = processor.process(processor.key(samples[3], frames=(0, 3, 6, 9)))
    assert spread.inputs["second_per_grid_ts"].tolist() == [0.75]


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_by_one(samples: list[Sample], family: Family, tmp_path: Path) -> None:
    processor = MediaProcessor(tiny_processor(family))
    wide = write_clip(tmp_path / "wide.mp4", moving_square(4, 32))
    indices = [(0, 1), (4, 5), (2, 3), (0, 1, 2, 3)]
    frames = [read_frames(samples[1].video, i) for i in indices[:2]]
    frames += [read_frames(wide, i) for i in indices[2:]]
    batch = processor.process_frames(frames, 8.0, indices)
    single = [processor.process_frames([f], 8.0, [i]) for f, i in zip(frames, indices, strict=True)]
    assert batch["video_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 4], [1, 8, 8], [2, 8, 8]]
    for name, value in batch.items():
        torch.testing.assert_close(value, torch.cat([s[name] for s in single]), rtol=0, atol=0)
    stacked = processor.process_frames(np.stack(frames[:2]), [8.0, 4.0], indices[:2])
    torch.testing.assert_close(stacked["pixel_values_videos"], batch["pixel_values_videos"][:32])
    if family == "qwen2_5_vl":
        assert stacked["second_per_grid_ts"].tolist() == [0.25, 0.5]


def test_two_clips_and_a_system_prompt(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor(), system_prompt="Look closely.")
    media = [processor.process(processor.key(s)) for s in samples[:2]]
    prompt = processor.encode(samples[0], media)
    assert (prompt.mm_token_type_ids == 2).sum() == 4 + 8 and prompt.media == tuple(media)
    text = processor.tokenizer.decode(prompt.input_ids)
    first, second = (f"<|vision_start|>{m.placeholder}<|vision_end|>" for m in media)
    assert text == (
        f"<|im_start|>system\nLook closely.<|im_end|>\n<|im_start|>user\n{first}{second}Where does "
        "the square go next?\nA. left\nB. right\nC. up\nD. down<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("question", "options", "text"),
    [
        ("Which?", ("up", "down"), "Which?\nA. up\nB. down"),
        ("Which: A. up B. down?", ("up", "down"), "Which: A. up B. down?"),
        ("Which: (A) up, (B) down?", ("up", "down"), "Which: (A) up, (B) down?"),
        ("Is it up or down?", ("up", "down"), "Is it up or down?\nA. up\nB. down"),
        ("Column A, B or C?", ("A", "B", "C"), "Column A, B or C?"),
        ("Why?", (), "Why?"),
    ],
)
def test_question_text(question: str, options: tuple[str, ...], text: str) -> None:
    assert question_text(Sample("s", "v.mp4", question, "A", options)) == text


def test_key_of_samples_with_and_without_frames(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor(), FrameRule(4))
    plain = replace(samples[1], frames=())
    assert processor.key(samples[1]).frames == (0, 1, 2, 3)
    assert processor.key(plain).frames == (0, 2, 5, 7)  # spread over the file's 8 frames
    assert processor.key(plain, frames=[6, 7]).frames == (6, 7)
    assert processor.key(plain).processor == processor.fingerprint


def test_fingerprint(tmp_path: Path) -> None:
    fingerprint = MediaProcessor(tiny_processor()).fingerprint
    tiny_processor().save_pretrained(tmp_path)
    assert MediaProcessor(AutoProcessor.from_pretrained(tmp_path)).fingerprint == fingerprint
    # further tokens change nothing about pixels; another normalisation does
    assert MediaProcessor(tiny_processor(extra_tokens=["<|x|>"])).fingerprint == fingerprint
    assert MediaProcessor(tiny_processor("qwen2_5_vl")).fingerprint != fingerprint
    other = tiny_processor()
    other.video_processor.image_mean = [0.4, 0.5, 0.5]
    assert MediaProcessor(other).fingerprint != fingerprint


def test_processor_survives_pickling(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor())
    copy = pickle.loads(pickle.dumps(processor))
    key = processor.key(samples[0])
    assert copy.key(samples[0]) == key
    torch.testing.assert_close(copy.process(key).inputs, processor.process(key).inputs)


def test_cache_keeps_the_last_used(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor())
    keys = [processor.key(s) for s in samples[:3]]
    source = LocalMedia(processor, 2e-5)
    first = source.get(keys[0])
    source.get(keys[1])
    assert source.get(keys[0]) is first and len(source) == 2
    source.get(keys[2])  # keys[1] was used longest ago and goes
    assert source.get(keys[0]) is first and len(source) == 2
    with pytest.raises(RecipeError, match="media_cache_gb is 0"):
        LocalMedia(processor, 0)


def test_a_failure_is_not_cached(tmp_path: Path) -> None:
    processor = MediaProcessor(tiny_processor())
    path = tmp_path / "late.mp4"
    key = MediaKey(str(path), (0, 1), processor.fingerprint)
    source = LocalMedia(processor, 2e-5)
    with pytest.raises(VideoError, match=r"late\.mp4: no such video file"):
        source.get(key)
    write_clip(path, moving_square(4))
    assert source.get(key).inputs["video_grid_thw"].tolist() == [[1, 4, 4]]


def test_clip_that_the_processor_refuses(samples: list[Sample], tmp_path: Path) -> None:
    processor = MediaProcessor(tiny_processor())
    narrow = write_clip(tmp_path / "narrow.mp4", np.zeros((2, 8, 2048, 3), np.uint8))
    sample = replace(samples[0], video=str(narrow), frames=(0, 1))
    with pytest.raises(VideoError) as caught:
        processor.process(processor.key(sample))
    message = str(caught.value)
    assert message.startswith(f"{narrow}: Qwen3VLVideoProcessor refuses 2 frames of 8x2048")
    assert "re-encode the video" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_still_picture_is_shown_as_long_as_a_patch(samples: list[Sample], family: Family) -> None:
    processor = MediaProcessor(tiny_processor(family))
    still, twice = (
        processor.process(processor.key(samples[0], frames=frames)) for frames in [(3,), (3, 3)]
    )
    assert still.timestamps == (0.375,) and still.placeholder == twice.placeholder
    assert still.inputs["video_grid_thw"].tolist() == [[1, 4, 4]]
    for name, value in still.inputs.items():
        if name != "second_per_grid_ts":
            torch.testing.assert_close(value, twice.inputs[name], rtol=0, atol=0)


def test_a_pool_a_window_and_images(samples: list[Sample], tmp_path: Path) -> None:
    processor = MediaProcessor(tiny_processor(), FrameRule(4))
    row = replace(samples[3], frames=(0, 3), imagine=((4,),), pool=5)  # 12 frames, 8 a second
    assert processor.key(row).frames == (1, 8)
    assert processor.key(row, row.imagine[0]).frames == (10,)
    assert processor.key(replace(row, window=(0.5, 1.25))).frames == (5, 7)
    files = []
    for i, frame in enumerate(moving_square(3)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    pictures = replace(row, video="row 7", images=tuple(files), frames=(), pool=0)
    key = processor.key(pictures)
    assert (key.path, key.frames, key.files) == ("row 7", (0, 1, 2), tuple(files))
    media = processor.process(key)
    assert media.timestamps == (0.0, 1.0, 2.0)  # a second apart
    np.testing.assert_array_equal(
        read_frames("row 7", [2, 0], images=files), moving_square(3)[[2, 0]]
    )


def test_a_picture_without_a_suffix_is_read_as_a_picture(tmp_path: Path) -> None:
    processor = MediaProcessor(tiny_processor())
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")  # whose colours FFmpeg smooths otherwise
    bare = tmp_path / "a"
    bare.write_bytes((tmp_path / "a.jpg").read_bytes())
    named = Sample("s", str(tmp_path / "a.jpg"), "?", "A")
    held = replace(named, video=str(bare), images=(str(bare),))
    expected, got = (processor.process(processor.key(s)).inputs for s in (named, held))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_file_that_changes_is_another_clip(tmp_path: Path) -> None:
    processor = MediaProcessor(tiny_processor())
    source = LocalMedia(processor)
    path = write_clip(tmp_path / "a.mp4", moving_square(4, seed=1))
    sample = Sample("s", str(path), "?", "A", frames=(0, 1))
    before = processor.key(sample)
    assert processor.key(sample) == before
    pixels = source.get(before).inputs["pixel_values_videos"]
    copy = tmp_path / "b.mp4"
    copy.write_bytes(path.read_bytes())
    assert processor.key(replace(sample, video=str(copy))).content == before.content
    write_clip(path, moving_square(4, seed=2))
    after = processor.key(sample)
    assert after != before and after.frames == before.frames
    assert (source.get(after).inputs["pixel_values_videos"] - pixels).abs().max() > 0.1
    with pytest.raises(VideoError, match=r"a\.mp4: the file changed while it was in use"):
        processor.process(before)


def test_what_is_in_use_stays(samples: list[Sample]) -> None:
    keys = [MediaKey(f"{i}.mp4", (), "p") for i in range(4)]
    cache: ByteCache[int] = ByteCache(3e-9)
    for i, key in enumerate(keys[:3]):
        cache.put(key, i, 1)
    cache.hold(keys[:2])
    cache.put(keys[3], 3, 2)
    assert list(cache) == [keys[0], keys[1], keys[3]] and cache.bytes == 4
    cache.hold(())
    assert cache.get(keys[0]) == 0
    cache.put(keys[2], 2, 1)
    assert list(cache) == [keys[0], keys[2]] and cache.bytes == 2  # keys[1], keys[3]: used before


def test_key_of_another_processor(samples: list[Sample]) -> None:
    key = MediaProcessor(tiny_processor("qwen2_5_vl")).key(samples[0])
    with pytest.raises(DataError, match="use the same processor files"):
        MediaProcessor(tiny_processor()).process(key)


def test_question_with_media_tokens(samples: list[Sample]) -> None:
    processor = MediaProcessor(tiny_processor())
    media = processor.process(processor.key(samples[0]))
    for token, count in [("<|video_pad|>", "2 video tokens"), ("<|image_pad|>", "1 image tokens")]:
        sample = replace(samples[0], question=f"What is {token}?")
        with pytest.raises(DataError) as caught:
            processor.encode(sample, [media])
        message = str(caught.value)
        assert "sample 'clip0'" in message and count in message and "from the question" in message


def test_text_and_clip_of_different_processors(samples: list[Sample]) -> None:
    coarse = tiny_processor()
    coarse.video_processor.merge_size = 1
    media = MediaProcessor(coarse).process(MediaProcessor(coarse).key(samples[0]))
    with pytest.raises(DataError, match=r"sample 'clip0'.* same processor"):
        MediaProcessor(tiny_processor()).encode(samples[0], [media])


def test_processors_without_video_are_refused() -> None:
    processor = tiny_processor()
    for refused in (processor.tokenizer, processor.image_processor):
        with pytest.raises(PolicyError) as caught:
            MediaProcessor(refused)
        message = str(caught.value)
        assert type(refused).__name__ in message and "takes no videos" in message
        assert "Qwen3-VL, Qwen3.5 or Qwen2.5-VL" in message
