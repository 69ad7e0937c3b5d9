"""Side-by-side measurements, each a script that prints tables."""

import os

# Before `tests`, which sets the threads that torch starts with.
import torch  # noqa: F401

_own = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}

# Before a script imports TRL, which imports torchvision and vLLM: this makes both importable.
import tests  # noqa: E402, F401

# `tests` hides GPUs and takes one thread; a measurement wants what the machine has.
for _name, _value in _own.items():
    if _value is None:
        os.environ.pop(_name, None)
    else:
        os.environ[_name] = _value
