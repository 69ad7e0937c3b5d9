"""What a user's reward takes, found out in a process of its own, without Ray.

For `foresight check` and `foresight rewards list`: the file or package is imported there, never
here, and must be so within a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
        answer, said = Path(folder, "signature.json"), Path(folder, "said.txt")
        # -P and the path of this process: the same modules are found as by Ray's workers.
        command = [sys.executable, "-P", "-m", __name__, target, str(answer)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Into a file: a pipe would stay open for as long as whatever the import starts.
        with said.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            return RecipeError(f"{target} was not imported within {TIMEOUT:.0f} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and all that it started
            process.wait()
        if not answer.is_file():
            text = said.read_text(encoding="utf-8", errors="replace").strip()
            text = text or f"the process ended with {process.returncode}"
            return RecipeError(f"{target} cannot be imported: {_cause_first(text)}")
        values: Any = json.loads(answer.read_text(encoding="utf-8"))
    lists: Any = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Signature(**{**values, **lists})


def _cause_first(said: str) -> str:
    """What a process said at its end, with the message of an error before its traceback."""
    lines = said.splitlines()
    # A message may have lines of its own, so it is the first one after the innermost frame.
    frames = [place for place, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] :] if frames else lines[-1:]
    cause = next((line for line in after if line[:1].strip()), "")
    rest = lines if frames or not cause else lines[:-1]
    return "\n".join([cause, *rest] if cause else lines)


if __name__ == "__main__":
    _, wanted, out = sys.argv
    Path(out).write_text(json.dumps(asdict(read_signature(load(wanted)))), encoding="utf-8")
