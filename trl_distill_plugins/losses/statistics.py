"""Figures about one tile that every run logs, whatever its losses."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trl_distill_plugins.losses.sparse import MergedTile
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile, teacher_of
from trl_distill_plugins.losses.vocabulary import SharedTile

# Order of the columns the functions here and the native kernel write.
STATISTICS = ("teacher_kl", "entropy", "teacher_entropy", "teacher_top1_agreement", "mean_token_accuracy")
TEACHER_STATISTICS = ("teacher_kl", "teacher_entropy", "teacher_top1_agreement")


def tile_statistics(tile: LogitsTile, merged: MergedTile | SharedTile | None = None) -> Tensor:
    """Return `[n, 5]`, columns as in `STATISTICS`, at T = 1: KL(p || q), entropy of q and of p, whether q's most likely
    token is p's, whether it is the label. The teacher's three are 0 where there is none; of a sparse teacher, or one of
    another vocabulary, they are taken over the `merged` classes."""
    log_q = tile.student.log_softmax(-1)
    top_q, entropy = log_q.argmax(-1), -(log_q.exp() * log_q).sum(-1)
    if merged is not None:
        return class_statistics(merged.tile, partial(merged.agrees, top_q), top_q, entropy)
    if tile.teacher is None:
        zero = torch.zeros_like(entropy)
        return torch.stack([zero, entropy, zero, zero, (top_q == tile.labels).to(entropy.dtype)], dim=-1)
    p = tile.teacher.probs()
    return _joined(tile, tile.teacher, p, log_q, entropy, top_q, top_q == p.argmax(-1))


def class_statistics(view: LogitsTile, agrees: Callable[[Tensor], Tensor], top_q: Tensor, entropy: Tensor) -> Tensor:
    """The same where a loss sees classes of tokens: `view` is the tile over them at T = 1. `top_q` and `entropy`, both
    `[n]`, are the student's over the whole vocabulary; `agrees` says, given p over the classes, whether `top_q` is its
    most likely token."""
    teacher = teacher_of(view)
    p = teacher.probs()
    return _joined(view, teacher, p, view.student.log_softmax(-1), entropy, top_q, agrees(p))


def _joined(
    tile: LogitsTile, teacher: TeacherTile, p: Tensor, log_q: Tensor, entropy: Tensor, top_q: Tensor, agrees: Tensor
) -> Tensor:
    log_p, accuracy = teacher.log_probs(), (top_q == tile.labels).to(entropy.dtype)
    kl, teacher_entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    return torch.stack([kl, entropy, teacher_entropy, agrees.to(entropy.dtype), accuracy], dim=-1)
