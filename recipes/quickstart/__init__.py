"""The quickstart: a tiny video model, made from nothing, that learns to imagine on two CPU
cores.
"""

import rl  # noqa: F401 - makes torchvision importable before transformers looks for it
