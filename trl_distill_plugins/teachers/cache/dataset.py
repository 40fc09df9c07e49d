"""A cache as a Hugging Face dataset, and back, with equal content.

    README.md                    the dataset card, which says where the rows are
    cache.json                   the header of the cache, the digest of its content, how many rows
    data/train-00000.parquet     `key` (hex) and `record` (bytes that `codec.decode` reads), in the order of the keys
    teacher_completions.jsonl    what the teacher wrote while the cache was built, if anything

cache.json is written last, so that half a dataset is refused.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.teachers.cache.header import FORMAT
from trl_distill_plugins.teachers.cache.shards import KEY_BYTES
from trl_distill_plugins.teachers.cache.store import CacheStore
from trl_distill_plugins.teachers.completions import FILE_NAME as COMPLETIONS_FILE

MANIFEST_FILE = "cache.json"

_GROUP_ROWS = 1024  # of a row group, and of a shard that is made of one
_FILE_GROUPS = 64
_COLUMNS = pa.schema([("key", pa.string()), ("record", pa.binary())])
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
tags:
- distillation
---
# What {teacher} says of {texts} texts

A teacher cache of trl-distill-plugins: of each trained position the likeliest tokens, or draws, and their log-probs.

    trl-distill cache pull REPO DIR          # from the hub, or `trl-distill cache import FOLDER DIR`
    trl-distill train --config FILE.yaml --teacher_model_name_or_path cache:DIR

`key` is a digest of the token ids of a text and of which are trained; `trl_distill_plugins.teachers.cache.codec.decode`
reads a `record`. The texts themselves are not here.

| | |
|---|---|
{fields}
"""


def export_dataset(store: CacheStore, folder: Path) -> None:
    """Write the cache as a dataset into `folder`, which is new or empty.

    Raises:
        DataError: something is in the folder already, or a record is damaged.
    """
    _require_empty(folder)
    (folder / "data").mkdir(parents=True)
    rows = zip(store.keys(), store.blobs(), strict=True)
    for number in range(max(1, -(-len(store) // (_GROUP_ROWS * _FILE_GROUPS)))):
        path = folder / "data" / f"train-{number:05}.parquet"
        with pq.ParquetWriter(path, _COLUMNS, compression="none", use_dictionary=False, write_statistics=False) as file:
            for _ in range(_FILE_GROUPS):
                group = list(islice(rows, _GROUP_ROWS))
                file.write_table(pa.table([[k.hex() for k, _ in group], [bytes(b) for _, b in group]], schema=_COLUMNS))
    fields = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in store.header.items())
    card = _CARD.format(teacher=store.header["teacher"], texts=len(store), fields=fields)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if (store.folder / COMPLETIONS_FILE).exists():
        shutil.copyfile(store.folder / COMPLETIONS_FILE, folder / COMPLETIONS_FILE)
    manifest = {"header": store.header, "texts": len(store), "content": store.content_digest()}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def import_dataset(folder: Path, target: Path) -> CacheStore:
    """Make the cache in `target`, new or empty, that the dataset in `folder` was; it appears whole or not at all.

    Raises:
        DataError: the folder holds no such dataset, one of another format, or one that is damaged.
    """
    manifest = _read_manifest(folder)
    _require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        store = CacheStore.create(Path(scratch) / "cache", manifest["header"])
        for group in _groups(folder):
            store.add_shard(hashlib.blake2b(b"".join(key for key, _ in group), digest_size=8).hexdigest(), group)
        if store.content_digest() != manifest["content"]:
            raise DataError(
                f"{folder} is damaged: it has {len(store)} of {manifest['texts']} texts, or a record differs from what "
                "was exported; fetch it again"
            )
        if (folder / COMPLETIONS_FILE).exists():
            shutil.copyfile(folder / COMPLETIONS_FILE, store.folder / COMPLETIONS_FILE)
        store.folder.replace(target)  # an empty folder gives way
    return CacheStore(target)


def _groups(folder: Path) -> Iterator[list[tuple[bytes, bytes]]]:
    for path in sorted((folder / "data").glob("*.parquet")):
        try:
            file = pq.ParquetFile(path)
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=_COLUMNS.names)
                keys = [bytes.fromhex(key) for key in table["key"].to_pylist()]
                if any(len(key) != KEY_BYTES for key in keys):
                    raise ValueError("a key has another length")
                if keys:
                    yield list(zip(keys, table["record"].to_pylist(), strict=True))
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are some of these
            raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}; fetch it again") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
        written = manifest["header"]["format"]
        manifest["texts"], manifest["content"]
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no exported teacher cache: {MANIFEST_FILE} is missing; `cache export` writes it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged; fetch it again") from None
    if written != FORMAT:
        raise DataError(f"{folder} is a cache of format {written}; this version reads {FORMAT}")
    return manifest


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; name a new folder")
