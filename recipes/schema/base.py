"""What all parts of a recipe's schema are built from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from rl.data.formats.source import names_file

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


def data_source(source: str, info: ValidationInfo) -> str:
    """What `rl.data.formats.read_samples` takes: a file or folder beside the recipe, or the name of
    a data set on the Hub, which has a slash and no file's suffix. Both may end in ":split".
    """
    base, colon, split = source.rpartition(":") if ":" in source else (source, "", "")
    if beside_recipe(Path(source), info).exists():
        base, colon, split = source, "", ""
    local = beside_recipe(Path(base), info)
    hub = base.count("/") in (1, 2) and not base.startswith((".", "/", "~")) and "\\" not in base
    if hub and not names_file(base) and not local.exists() and not local.parent.exists():
        return source
    return f"{local}{colon}{split}"


RecipePath = Annotated[Path, AfterValidator(beside_recipe)]
DataSource = Annotated[str, AfterValidator(data_source)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
