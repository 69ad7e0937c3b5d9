"""Replies of a judge on disk: one SQLite file, shared by the processes of a machine."""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from itertools import count
from pathlib import Path

from rl.errors import RewardError

CHUNK = 500  # keys a query; SQLite takes 999 at least
BUSY_S = 10.0  # how long to wait for another process that is writing

_TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)"


def default_path() -> Path:
    """``judge.sqlite`` in Foresight's part of the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "foresight", "judge.sqlite")


class JudgeCache:
    """Replies by key, kept from the moment they are put.

    The file is in write-ahead mode: any number of processes of one machine may read and write it at
    the same time. It belongs on a local disk, as SQLite locks are not to be trusted on a network
    drive. A damaged file is renamed to ``<name>.damaged-<n>``, with a warning, and a new one begun.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or create the file. Raises `RewardError`, which names it, where that cannot be."""
        self.path = Path(path).expanduser()
        self._broken = False
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as error:
            self._set_aside(error)
            self._connection = self._connect()

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """The replies that are there, by key. Raises `RewardError` if the file cannot be read."""
        try:
            return self._select(keys)
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from error
        except sqlite3.DatabaseError as error:  # a damaged page that opening did not meet
            self.close()
            self._set_aside(error)
            self._connection = self._connect()
            return {}

    def put(self, key: str, reply: str) -> None:
        """Store a reply. Where the file cannot be written, warn once: an answer that was paid for
        counts, kept or not.
        """
        if self._broken:
            return
        try:
            self._insert(key, reply)
        except sqlite3.DatabaseError as error:
            self._broken = True
            warnings.warn(
                f"judge cache {self.path} cannot be written ({error}); the answers of this call "
                "count, but are not kept. Free space, or set the judge's `cache` to another file",
                stacklevel=2,
            )

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> JudgeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> sqlite3.Connection:
        """Raises `RewardError` where there can be no such file, `DatabaseError` if it is
        damaged.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: one statement is one transaction, and a process that is killed loses none.
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise self._unusable(error) from error
        try:
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise self._unusable(error) from error
            raise
        return connection

    def _select(self, keys: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for at in range(0, len(keys), CHUNK):
            some = keys[at : at + CHUNK]
            query = f"SELECT key, reply FROM replies WHERE key IN ({','.join('?' * len(some))})"
            with closing(self._connection.execute(query, some)) as rows:
                found.update(rows.fetchall())
        return found

    def _insert(self, key: str, reply: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        for number in count(1):
            aside = self.path.with_name(f"{self.path.name}.damaged-{number}")
            if not aside.exists():
                break
        # The log goes with its file: beside a new one SQLite would try to replay it.
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        warnings.warn(
            f"judge cache {self.path} is damaged ({error}); it was renamed to {aside} and a new "
            "one was begun, so answers will be asked for again",
            stacklevel=2,
        )

    def _unusable(self, error: Exception) -> RewardError:
        return RewardError(
            f"judge cache {self.path} cannot be used: {error}. Set the judge's `cache` to a file "
            "that can be written, or to null for none"
        )


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead mode.

    Of processes that do so together some get "locked" at once, whatever the busy timeout.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)
