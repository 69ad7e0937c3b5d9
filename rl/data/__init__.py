"""From a manifest and video files to the tensors a model takes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.data.frames import FrameRule, select_frames
    from rl.data.manifest import read_manifest
    from rl.data.media import LocalMedia, MediaProcessor, PromptInputs
    from rl.data.readers import VideoInfo
    from rl.data.video import probe, read_clip, read_frames

__all__ = [
    "FrameRule",
    "LocalMedia",
    "MediaProcessor",
    "PromptInputs",
    "VideoInfo",
    "probe",
    "read_clip",
    "read_frames",
    "read_manifest",
    "select_frames",
]

# Resolved on first use: recipes are checked without loading transformers, which takes seconds.
_HOMES = {
    "rl.data.frames": ("FrameRule", "select_frames"),
    "rl.data.manifest": ("read_manifest",),
    "rl.data.media": ("LocalMedia", "MediaProcessor", "PromptInputs"),
    "rl.data.readers": ("VideoInfo",),
    "rl.data.video": ("probe", "read_clip", "read_frames"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'rl.data' has no attribute {name!r}")
