"""What all parts of a recipe's schema are built from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


def beside_recipe(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path.cwd())
    return Path(folder, path.expanduser()).resolve()


def local_or_hub(path: str, info: ValidationInfo) -> str:
    local = beside_recipe(Path(path), info)
    on_hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and "\\" not in path
    return path if on_hub and not local.exists() else str(local)


RecipePath = Annotated[Path, AfterValidator(beside_recipe)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
