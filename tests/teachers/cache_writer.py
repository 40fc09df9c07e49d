"""A process that builds a cache, for the tests that kill it, fill its disk, or run two of it.

    python cache_writer.py FOLDER NAME FIRST SHARDS BYTES HEADER [LIMIT]

adds that many shards of 20 records with blobs of BYTES, from record FIRST, and says the name of each once it is added;
LIMIT is the largest file it may write.
"""

import hashlib
import json
import resource
import sys
from pathlib import Path

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache.store import CacheStore

RECORDS = 20


def record(number, size):
    """The key of a record, and the blob that belongs to it."""
    key = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    return key, blob_of(key, size)


def blob_of(key, size):
    return hashlib.shake_128(key).digest(size)


def main(folder, name, first, shards, size, header, limit=None):
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        store = CacheStore.create(Path(folder), json.loads(header))
        for shard in range(int(shards)):
            start = int(first) + shard * RECORDS
            store.add_shard(f"{name}-{shard}", (record(i, int(size)) for i in range(start, start + RECORDS)))
            print(f"{name}-{shard}", flush=True)
    except (DataError, OSError) as error:
        print(json.dumps([getattr(error, "errno", None), getattr(error, "filename", None), str(error)]), flush=True)
        sys.exit(3)


if __name__ == "__main__":
    main(*sys.argv[1:])
