"""Every error Foresight raises.

    ForesightError
    ├── RecipeError        (ValueError)         a recipe key or value is wrong
    ├── DataError          (ValueError)         a manifest row is wrong
    │   └── MissingVideoError (FileNotFoundError)  its video is not there
    ├── VideoError         (RuntimeError)       a file that cannot be decoded as a video
    │   ├── FrameError      (ValueError)         frames or a window that it does not have
    │   └── VideoTimeoutError (TimeoutError)     decoding it took too long
    ├── DecoderError       (RuntimeError)       no process that decodes can be had
    ├── ProtocolError      (ValueError)         ids that no latent protocol could have produced
    ├── TrajectoryError    (ValueError)         a trajectory whose parts contradict each other
    ├── PolicyError        (ValueError)         a model that cannot be a latent policy
    ├── ObjectiveError     (ValueError)         a training objective that cannot work
    ├── RewardError        (RuntimeError)       a reward that broke its contract
    ├── RolloutError       (RuntimeError)       an engine or a worker failed
    │   └── SyncError      (TimeoutError)       a weight update did not arrive
    └── CheckpointError    (RuntimeError)       a checkpoint that cannot be used

Each also derives from the standard exception it stands for. None takes extra constructor arguments,
so that all of them survive the pickling between Ray processes. A message says what is wrong, which
sample, file, row or key it is, and what to do.
"""


class ForesightError(Exception):
    """Base of all errors raised on purpose by Foresight."""


class RecipeError(ForesightError, ValueError):
    """A recipe key or value is wrong."""


class DataError(ForesightError, ValueError):
    """A manifest or one of its rows is wrong."""


class MissingVideoError(DataError, FileNotFoundError):
    """A manifest row names a video that is not there."""

    # OSError's own __str__ drops single-argument messages in some subclasses; keep ours.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class VideoError(ForesightError, RuntimeError):
    """A file cannot be decoded as a video, or lacks the frames asked for."""


class FrameError(VideoError, ValueError):
    """A row asks for frames, or a window, that its video does not have."""


class VideoTimeoutError(VideoError, TimeoutError):
    """Decoding a file took longer than it may."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DecoderError(ForesightError, RuntimeError):
    """The process that decodes videos cannot be started: this machine cannot read any video."""


class ProtocolError(ForesightError, ValueError):
    """A latent protocol is inconsistent, or token ids break it."""


class TrajectoryError(ForesightError, ValueError):
    """The parts of a trajectory contradict each other."""


class PolicyError(ForesightError, ValueError):
    """A model cannot serve as a latent policy."""


class ObjectiveError(ForesightError, ValueError):
    """A training objective that cannot work was asked for."""


class RewardError(ForesightError, RuntimeError):
    """A reward broke its contract."""


class RolloutError(ForesightError, RuntimeError):
    """An engine or a rollout worker failed."""


class SyncError(RolloutError, TimeoutError):
    """A weight update did not reach every worker."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointError(ForesightError, RuntimeError):
    """A checkpoint is incomplete or does not fit."""
