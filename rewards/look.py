"""What a user's reward takes, found out in a process of its own, without Ray.

For `foresight check` and `foresight rewards list`: the file or package is imported there, never
here, and must be so within a deadline.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rewards.functions import Signature, load, read_signature
from rl.errors import RecipeError

TIMEOUT = 120.0  # seconds: an import may load torch


def look(targets: Sequence[str]) -> list[Signature | RecipeError]:
    """What each target takes, or the error that its import ended in. They are imported side by
    side.
    """
    if not targets:
        return []
    with ThreadPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        return list(pool.map(_look, targets))


def _look(target: str) -> Signature | RecipeError:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "signature.json")
        # -P and the path of this process: the same modules are found as by Ray's workers.
        command = [sys.executable, "-P", "-m", __name__, target, str(answer)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT, env=environment
            )
        except subprocess.TimeoutExpired:
            return RecipeError(f"{target} was not imported within {TIMEOUT:.0f} s")
        if not answer.is_file():
            said = done.stderr.strip() or f"the process ended with {done.returncode}"
            return RecipeError(f"{target} cannot be imported:\n{said}")
        values: Any = json.loads(answer.read_text(encoding="utf-8"))
    lists: Any = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Signature(**{**values, **lists})


if __name__ == "__main__":
    _, wanted, out = sys.argv
    Path(out).write_text(json.dumps(asdict(read_signature(load(wanted)))), encoding="utf-8")
