"""Let a CUDA-linked torchvision import beside a CPU build of torch.

The torchvision wheel that package indexes serve by default is linked against CUDA. Beside a
CPU-only torch its compiled library cannot be loaded, its operators stay unregistered, and ``import
torchvision`` fails on them. That is worse than no torchvision at all: transformers only looks
whether it is installed, so even text models stop importing. The video processors need nothing but
torchvision's pure-Python transforms, for which the two operator schemas below are enough. The
compiled operators themselves (nms, image files) stay unavailable, and nothing here calls them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_registered: list[torch.library.Library] = []  # a library's schemas live as long as the object


def install() -> bool:
    """Register torchvision's schemas where its own library cannot; True if that was needed.

    No effect with a GPU build of torch, without torchvision, or beside a torchvision that works.
    Call it before the first import of transformers or torchvision; further calls do nothing.
    """
    if torch.version.cuda is not None or torch.version.hip is not None or _operators_known():
        return False
    spec = find_spec("torchvision")  # finds the package without importing it
    if spec is None or spec.origin is None or _loads(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _registered.append(library)
    return True


def _operators_known() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _loads(package: Path) -> bool:
    """Whether torchvision's own library loads into this torch, which registers the operators for
    good.
    """
    for path in sorted(p for p in package.glob("_C.*") if p.suffix in (".so", ".pyd", ".dylib")):
        try:
            torch.ops.load_library(path)
        except OSError:  # a library it links against is missing, or a symbol is
            continue
        return _operators_known()
    return False
