"""Fills a cache: what a teacher says about each document, kept as shards that become visible whole.

The documents are cut into shards by their order in the dataset, and a shard into batches by length, so that a shard
holds the same bytes whoever makes it, after whatever interruption, on any number of processes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate

import torch
from tqdm.auto import tqdm

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.losses.joint import JointSignal
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.teachers.base import Teacher
from trl_distill_plugins.teachers.cache.codec import encode
from trl_distill_plugins.teachers.cache.documents import Document, padded
from trl_distill_plugins.teachers.cache.selection import Selection, TopK
from trl_distill_plugins.teachers.cache.store import CacheStore
from trl_distill_plugins.teachers.completions import Ranks

SHARD_DOCUMENTS = 256


def unique(documents: Iterable[Document]) -> list[Document]:
    """Each document once, in the order in which they come first."""
    return list({document.key: document for document in documents}.values())


def fill_cache(
    store: CacheStore,
    teacher: Teacher,
    documents: Sequence[Document],
    selection: Selection,
    *,
    vocabulary: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> int:
    """Write what the store lacks of `documents`, all different; return how many this process wrote.

    A shard that was begun and not finished is begun anew; Ctrl-C or a crash loses no other.

    Args:
        store: the cache, with its header.
        teacher: gives dense signals on `device`, or names the likeliest tokens itself.
        documents: in the order of the dataset.
        selection: which tokens of each position are kept.
        vocabulary: the tokens of the student's tokenizer; the teacher's further columns are left out.
        batch_size: documents the teacher reads at a time.
        device: where the teacher is.
        ranks: every process takes every n-th shard.
    """
    shards = [documents[start : start + SHARD_DOCUMENTS] for start in range(0, len(documents), SHARD_DOCUMENTS)]
    mine = [[each for each in shard if each.key not in store] for shard in shards[ranks.index :: ranks.count]]
    total = sum(map(len, mine))
    with tqdm(total=total, desc="Teacher cache", unit="doc", disable=not total or ranks.index != 0) as progress:
        for shard in filter(None, mine):
            records: list[tuple[bytes, bytes]] = []
            for batch in _batches(shard, batch_size):
                records += _records(teacher, batch, selection, vocabulary, device)
                progress.update(len(batch))
            with suppress(FileExistsError):  # another builder was faster, with the same
                store.add_shard(_name(shard), records)
    ranks.wait()
    store.refresh()
    return total


def _batches(shard: list[Document], size: int) -> Iterator[list[Document]]:
    """By length, the longest first: little padding, and memory runs out at once or not at all."""
    ordered = sorted(shard, key=lambda document: -len(document.ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _name(shard: list[Document]) -> str:
    return hashlib.blake2b(b"".join(document.key for document in shard), digest_size=8).hexdigest()


def _records(
    teacher: Teacher, batch: list[Document], selection: Selection, vocabulary: int, device: torch.device
) -> Iterator[tuple[bytes, bytes]]:
    inputs, trained = padded(batch, device)
    signal = teacher.signal(inputs, trained)
    counts = [int(document.trained.sum()) for document in batch]
    if isinstance(signal, JointSignal):
        raise TeacherError(f"a cache is made from one teacher, and this is {teacher}; cache each by itself")
    if isinstance(signal, SparseSignal):
        if not isinstance(selection, TopK) or signal.weights is not None:
            raise TeacherError(
                "a teacher that names the likeliest tokens itself has no others to keep; leave out samples"
            )
        for document, end in zip(batch, accumulate(counts), strict=True):
            own = signal[end - int(document.trained.sum()) : end]
            yield document.key, encode(selection.of_named(own), vocabulary)
        return
    for document, hidden in zip(batch, signal.hidden.split(counts), strict=True):
        logits = signal.head(hidden)[:, :vocabulary].float()
        if not logits.max(-1).values.isfinite().all():
            raise TeacherError(f"the teacher {teacher} gave logits that are NaN or infinite; try another dtype for it")
        yield document.key, encode(selection(logits, _generator(document)), vocabulary, draws=selection.draws)


def _generator(document: Document) -> torch.Generator:
    """Draws depend on the document alone."""
    return torch.Generator().manual_seed(int.from_bytes(document.key[:7], "little"))
