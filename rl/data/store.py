"""Processed clips in memory, as many as fit into a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Generic, TypeVar

from rl.errors import RecipeError
from rl.interfaces import Media
from rl.trajectory import MediaKey

T = TypeVar("T")


class ByteCache(Generic[T]):
    """Values by key, the last used ones up to `gigabytes` (10^9 bytes) together.

    What `hold` names is never dropped, however large. Raises `RecipeError` for a cache without
    room.
    """

    def __init__(self, gigabytes: float) -> None:
        if gigabytes <= 0:
            raise RecipeError(
                f"data.media_cache_gb is {gigabytes}; give the store of clips some memory"
            )
        self._capacity = int(gigabytes * 1e9)
        self._values: OrderedDict[MediaKey, tuple[T, int]] = OrderedDict()
        self._held: Collection[MediaKey] = ()
        self.bytes = 0

    def get(self, key: MediaKey) -> T | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: MediaKey, value: T, size: int) -> None:
        """Keep a value of `size` bytes, and drop what was used longest ago if there is no room."""
        self.drop(key)
        self._values[key] = value, size
        self.bytes += size
        if self.bytes > self._capacity:
            for old in [k for k in self._values if k != key and k not in self._held]:
                self.drop(old)
                if self.bytes <= self._capacity:
                    break

    def hold(self, keys: Collection[MediaKey]) -> None:
        """Keep these, and no longer those that were held before."""
        self._held = frozenset(keys)

    def drop(self, key: MediaKey) -> None:
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]

    def __contains__(self, key: MediaKey) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[MediaKey]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def media_bytes(media: Media) -> int:
    """The memory that a processed clip takes."""
    return sum(value.nbytes for value in media.inputs.values())
