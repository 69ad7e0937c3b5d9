"""Clips and prompts as tensors, through the model family's own transformers processor.

Pixels are processed once a clip (`MediaProcessor.process`) and text once a question
(`MediaProcessor.encode`); the two agree because the clip carries the text that stands for it in a
prompt. For the same frames and question the result is what one call of the family's processor would
give.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
import torch
from transformers.processing_utils import ProcessorMixin
from transformers.video_utils import VideoMetadata

from rl.data.decoding import Clip
from rl.data.frames import FrameRule, resolve_frames, select_frames
from rl.data.store import ByteCache, media_bytes
from rl.data.video import TIMEOUT_S, describe, find_clip, read, read_ahead
from rl.errors import DataError, PolicyError, VideoError
from rl.interfaces import Media
from rl.trajectory import MediaKey, Sample


@dataclass(frozen=True)
class PromptInputs:
    """One prompt of P tokens with its clips in the order of the prompt."""

    input_ids: np.ndarray  # int64 [P]
    mm_token_type_ids: np.ndarray  # int64 [P]: 2 at video tokens, 0 at text
    media: tuple[Media, ...]


class MediaProcessor:
    """Wraps the processor of a video-language model (Qwen3-VL, Qwen3.5, Qwen2.5-VL and others built
    like them).

    `frames` says which frames a sample shows that lists none. `system_prompt` opens every prompt if
    given. A reader may take `decode_timeout_s` seconds over a clip. `fingerprint` names the pixel
    settings: processors with the same one give the same tensors; the tokenizer is no part of it.
    Raises `PolicyError` for a processor that takes no videos.
    """

    def __init__(
        self,
        processor: Any,
        frames: FrameRule = FrameRule(),
        *,
        system_prompt: str | None = None,
        decode_timeout_s: float = TIMEOUT_S,
    ) -> None:
        _require_video(processor)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.frames = frames
        self.system_prompt = system_prompt
        self.decode_timeout_s = decode_timeout_s
        self.temporal_patch_size = int(processor.video_processor.temporal_patch_size)
        self.merge_size = int(processor.video_processor.merge_size)
        self.fingerprint = _fingerprint(processor)

    def key(self, sample: Sample, frames: Sequence[int] | None = None) -> MediaKey:
        """The key of a sample's clip: of `frames`, written as in its row, if given, else of those
        that `rl.data.frames.select_frames` shows of it.

        Frames of the file that the row lists are not compared with it before the clip is processed.
        Raises `VideoError`.
        """
        clip = find_clip(sample.video, sample.images)
        shown = sample.frames if frames is None else tuple(frames)
        if not shown or sample.pool:
            info = describe(clip, self.decode_timeout_s)
            if frames is not None:
                shown = resolve_frames(sample, info, frames)
            else:
                shown = select_frames(sample, info, self.frames)
        return MediaKey(sample.video, shown, self.fingerprint, clip.files, clip.content)

    def process(self, key: MediaKey, ahead: MediaKey | None = None) -> Media:
        """Decode and process one clip, and meanwhile decode `ahead`, if that is the next one.

        Raises `VideoError`, which names the file, also where it changed since the key was made.

        Frames are shown in the order of the key, but always under ascending times: Qwen3-VL writes
        them into the prompt, where they would give away the order that shuffled frames hide.
        """
        if key.processor != self.fingerprint:
            raise DataError(
                f"{key.path}: the key was made by processor {key.processor}, this one is "
                f"{self.fingerprint}; use the same processor files for rollouts and training"
            )
        frames, info = read(_clip(key), key.frames, self.decode_timeout_s)
        if ahead is not None:
            with suppress(VideoError):  # which comes up again when it is its turn
                read_ahead(_clip(ahead), ahead.frames)
        shown = key.frames
        if len(shown) == 1:
            # A still picture: like these families' own, shown as long as a patch takes.
            shown, frames = (
                shown * self.temporal_patch_size,
                np.repeat(frames, self.temporal_patch_size, axis=0),
            )
        times = sorted(info.positions(shown))
        try:
            inputs = self.process_frames([frames], info.fps, [times])
        except ValueError as error:  # too long and narrow
            raise VideoError(
                f"{key.path}: {type(self.processor.video_processor).__name__} refuses "
                f"{len(key.frames)} frames of {info.height}x{info.width} pixels ({error}); "
                "re-encode the video"
            ) from error
        shown_at: Any = list(times)  # a fresh list: the processor pads it in place
        metadata = VideoMetadata(
            total_num_frames=info.frames, fps=info.fps, frames_indices=shown_at
        )
        placeholder = self.processor.replace_video_token(
            {"video_grid_thw": inputs["video_grid_thw"], "video_metadata": [metadata]}, 0
        )
        moments = sorted(info.positions(key.frames))
        return Media(key, inputs, placeholder, tuple(i / info.fps for i in moments))

    def process_frames(
        self,
        frames: np.ndarray | Sequence[np.ndarray],
        fps: float | Sequence[float],
        indices: Sequence[Sequence[float]],
    ) -> dict[str, torch.Tensor]:
        """Process B decoded clips at once; those of equal shape go through the processor as one
        tensor.

        `frames` are uint8 [B, T, H, W, 3] or B arrays [T, H, W, 3], `fps` the rate of their files
        (one for all, or one each), `indices` the frame numbers of each, or where its frames are in
        time, in units of that rate. Returns
        `pixel_values_videos` float32 [N, D] (the patches of all clips, one after the other),
        `video_grid_thw` int64 [B, 3] and, where the family takes it, `second_per_grid_ts` float32
        [B]. Clips whose sizes the processor must change may come out larger or smaller than within
        a longer clip: Qwen3-VL bounds the pixels of a whole clip.
        """
        videos = [
            torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2) for clip in frames
        ]
        output = self.processor.video_processor(
            videos, do_sample_frames=False, input_data_format="channels_first", return_tensors="pt"
        )
        inputs = {
            "pixel_values_videos": output["pixel_values_videos"].float(),
            "video_grid_thw": output["video_grid_thw"],
        }
        if "second_per_grid_ts" in self.processor.model_input_names:
            rates = [float(fps)] * len(videos) if isinstance(fps, int | float) else fps
            inputs["second_per_grid_ts"] = torch.tensor(
                [
                    self.temporal_patch_size * _spacing(i) / rate
                    for i, rate in zip(indices, rates, strict=True)
                ]
            )
        return inputs

    def encode(self, sample: Sample, media: Sequence[Media]) -> PromptInputs:
        """The prompt of a sample: its clips, its question and its options as one user message.

        Raises `DataError`, which names the sample, if text and clips do not fit together.
        """
        content: list[dict[str, str]] = [{"type": "video"} for _ in media]
        content.append({"type": "text", "text": question_text(sample)})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            messages.insert(
                0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}
            )
        text = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        video_token = self.processor.video_token
        pieces = text.split(video_token)
        if len(pieces) != len(media) + 1:
            raise DataError(
                f"sample {sample.id!r}: the prompt has {len(pieces) - 1} video tokens "
                f"{video_token!r} for {len(media)} clips; remove the token from the question, or "
                "use a chat template that writes one for each video"
            )
        text = pieces[0] + "".join(
            m.placeholder + piece for m, piece in zip(media, pieces[1:], strict=True)
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        types = np.asarray(self.processor.create_mm_token_type_ids([ids])[0], dtype=np.int64)
        patches = (
            sum(int(m.inputs["video_grid_thw"].prod(-1).sum()) for m in media) // self.merge_size**2
        )
        found = int((types == 2).sum())
        if found != patches or (types == 1).any():
            raise DataError(
                f"sample {sample.id!r}: the prompt has {found} video tokens and "
                f"{int((types == 1).sum())} image tokens, its clips have {patches} merged patches; "
                "remove media tokens from the question, and make clips and prompts with the same "
                "processor"
            )
        return PromptInputs(np.asarray(ids, dtype=np.int64), types, tuple(media))


class LocalMedia:
    """A `MediaSource` that processes clips in this process and keeps the last used ones, up to
    `gigabytes` together.
    """

    def __init__(self, processor: MediaProcessor, gigabytes: float = 4.0) -> None:
        self.processor = processor
        self._clips: ByteCache[Media] = ByteCache(gigabytes)

    def get(self, key: MediaKey) -> Media:
        """The clip of `key`, from memory or the file. Raises `VideoError`."""
        media = self._clips.get(key)
        if media is None:
            media = self.processor.process(key)
            self._clips.put(key, media, media_bytes(media))
        return media

    def __len__(self) -> int:
        return len(self._clips)


def question_text(sample: Sample) -> str:
    """The user's text: the question and, a line each, the options with their letters.

    The options are left out where the question lists them already ("A. left", "A) left", "(A)
    left", "A: left") and where every option is its own letter.
    """
    options = list(zip(ascii_uppercase, sample.options, strict=False))
    listed = all(
        option == letter or re.search(rf"\b{letter}[.):]\s*{re.escape(option)}", sample.question)
        for letter, option in options
    )
    return (
        sample.question
        if listed
        else "\n".join([sample.question, *(f"{a}. {b}" for a, b in options)])
    )


def _spacing(indices: Sequence[float]) -> float:
    """Mean distance of the frames shown, in frames of the file.

    transformers divides the length of the whole file by the number of frames shown. That is the
    same for frames sampled all over the file, and wrong for a clip that shows only its beginning.
    The order of the frames does not matter.
    """
    return (max(indices) - min(indices)) / (len(indices) - 1) if len(indices) > 1 else 1.0


def _clip(key: MediaKey) -> Clip:
    """The clip of a key, if its files still hold what they did when the key was made."""
    clip = find_clip(key.path, key.files)
    if key.content and clip.content != key.content:
        raise VideoError(
            f"{key.path}: the file changed while it was in use; leave the files of a run alone, or "
            "start again"
        )
    return clip


def _require_video(processor: Any) -> None:
    video = getattr(processor, "video_processor", None)
    takes_video = {"pixel_values_videos", "video_grid_thw"} <= set(
        getattr(video, "model_input_names", ())
    )
    expands = getattr(type(processor), "replace_video_token", None) not in (
        None,
        ProcessorMixin.replace_video_token,
    )
    if not (takes_video and expands):
        raise PolicyError(
            f"{type(processor).__name__} takes no videos as pixel_values_videos with "
            "video_grid_thw, so its model cannot be a video policy; use a model of the Qwen3-VL, "
            "Qwen3.5 or Qwen2.5-VL family, with its preprocessor files beside the weights"
        )


def _fingerprint(processor: Any) -> str:
    video = processor.video_processor
    settings = {
        "class": type(processor).__name__,  # decides the placeholder
        "video_class": type(video).__name__,
        "video": json.loads(video.to_json_string()),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
