"""Where each key of a cache lies: the keys of all shards, sorted, 24 bytes each."""

from collections.abc import Iterator, Sequence

import numpy as np

from trl_distill_plugins.teachers.cache.shards import KEY_BYTES, Shard


class KeyIndex:
    """Finds the record of a key in `shards`; of records with one key, the first."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        keys = np.concatenate([np.zeros(0, f"S{KEY_BYTES}"), *(shard.keys for shard in shards)])
        order = keys.argsort(kind="stable")
        keys = keys[order]
        first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        self._keys, self._records = keys[first], order[first]
        self._shards, self._starts = shards, np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> Iterator[bytes]:
        """All keys, rising."""
        return (key.ljust(KEY_BYTES, b"\0") for key in self._keys.tolist())  # numpy strips zeros

    def blobs(self) -> Iterator[memoryview]:
        """The blobs of `keys()`. Raises `DataError` at one that is damaged."""
        return map(self._blob, range(len(self)))

    def find(self, key: bytes) -> memoryview | None:
        """The blob of a key, or None. Raises `DataError` if it is damaged."""
        place = self._place(key)
        return None if place is None else self._blob(place)

    def __contains__(self, key: bytes) -> bool:
        return self._place(key) is not None

    def _place(self, key: bytes) -> int | None:
        place = int(self._keys.searchsorted(np.bytes_(key)))
        return place if place < len(self) and self._keys[place] == key.rstrip(b"\0") else None

    def _blob(self, place: int) -> memoryview:
        record = self._records[place]
        shard = self._starts.searchsorted(record, side="right") - 1
        return self._shards[shard].blob(int(record - self._starts[shard]))
