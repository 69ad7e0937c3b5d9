"""From a manifest and video files to the tensors a model takes."""

from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor, PromptInputs
from rl.data.video import VideoInfo, probe, read_clip, read_frames, uniform_indices

__all__ = [
    "LocalMedia",
    "MediaProcessor",
    "PromptInputs",
    "VideoInfo",
    "probe",
    "read_clip",
    "read_frames",
    "read_manifest",
    "uniform_indices",
]
