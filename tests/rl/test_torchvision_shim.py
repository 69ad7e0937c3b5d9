from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rl import torchvision_shim


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_rl_makes_transformers_and_its_video_processors_importable() -> None:
    code = "import rl; from transformers import Qwen3VLVideoProcessor as P; print(P().patch_size)"
    assert python(code) == "16"


def test_importing_rl_stays_light() -> None:
    heavy = "{'ray', 'vllm', 'trl', 'transformers', 'torchvision'}"
    assert python(f"import sys, rl; print({heavy} & set(sys.modules))") == "set()"


def test_install_is_idempotent() -> None:
    assert torchvision_shim.install() is False
    assert len(torchvision_shim._registered) <= 1


def test_a_gpu_build_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torchvision_shim, "_operators_known", lambda: False)
    assert torchvision_shim.install() is False
