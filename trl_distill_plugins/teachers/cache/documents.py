"""The documents of a batch, each with the address of what a teacher says about it.

The address is a digest of all that the teacher's word depends on: the token ids it sees, and after which of them a
token is trained. It is taken from the batch itself, so shuffling, padding, packing, subsets and the number of processes
change nothing.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_distill_plugins.teachers.cache.shards import KEY_BYTES


@dataclass(frozen=True)
class Document:
    """One text as the teacher sees it.

    Args:
        key: its address, 16 bytes.
        ids: token ids `[T]`, int64.
        trained: `[T - 1]`, bool, True where the next token is trained.
    """

    key: bytes
    ids: Tensor
    trained: Tensor


def documents_of(inputs: dict[str, Any], trained: Tensor) -> Iterator[Document]:
    """Yield the documents of a batch that train anything, in the order of its trained positions.

    Args:
        inputs: the teacher's view of a batch, `input_ids` `[B, T]` with an `attention_mask` or, for packed rows, with
            `position_ids` that start over at each document.
        trained: `[B, T - 1]`, True where the next token is trained.
    """
    ids, positions, mask = inputs["input_ids"].cpu(), inputs.get("position_ids"), inputs.get("attention_mask")
    trained = trained.cpu()
    for row in range(len(ids)):
        for start, end in _spans(ids, positions, mask, row):
            part = trained[row, start : end - 1]
            if part.any():
                yield Document(_key(ids[row, start:end], part), ids[row, start:end], part)


def padded(batch: Sequence[Document], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """A batch of documents, padded on the right: `input_ids` and `attention_mask` `[B, T]`, and what is trained,
    `[B, T - 1]`."""
    width = max(len(document.ids) for document in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, trained = torch.zeros_like(ids), torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for row, document in enumerate(batch):
        ids[row, : len(document.ids)] = document.ids
        mask[row, : len(document.ids)] = 1
        trained[row, : len(document.trained)] = document.trained
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, trained.to(device)


def _spans(ids: Tensor, positions: Tensor | None, mask: Tensor | None, row: int) -> list[tuple[int, int]]:
    if positions is not None:
        starts = (positions[row] == 0).nonzero().flatten().tolist()
        return list(zip(starts, [*starts[1:], ids.shape[1]], strict=True))
    if mask is None:
        return [(0, ids.shape[1])]
    kept = mask[row].nonzero().flatten()
    return [(int(kept[0]), int(kept[-1]) + 1)] if len(kept) else []


def _key(ids: Tensor, trained: Tensor) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(len(ids).to_bytes(4, "little"))
    digest.update(ids.to(torch.int32).numpy().tobytes())
    digest.update(np.packbits(trained.numpy()).tobytes())
    return digest.digest()
