"""Figures about one tile that every run logs, whatever its losses."""

import torch
from torch import Tensor

from trl_distill_plugins.losses.sparse import MergedTile
from trl_distill_plugins.losses.tiles import LogitsTile
from trl_distill_plugins.losses.vocabulary import SharedTile

# Order of the columns `tile_statistics` and the native kernel write.
STATISTICS = ("teacher_kl", "entropy", "teacher_entropy", "teacher_top1_agreement", "mean_token_accuracy")
TEACHER_STATISTICS = ("teacher_kl", "teacher_entropy", "teacher_top1_agreement")


def tile_statistics(tile: LogitsTile, merged: MergedTile | SharedTile | None = None) -> Tensor:
    """Return `[n, 5]`, columns as in `STATISTICS`, at T = 1: KL(p || q), entropy of q and of p, whether q's most likely
    token is p's, whether it is the label. The teacher's three are 0 where there is none; of a sparse teacher, or one of
    another vocabulary, they are taken over the `merged` classes."""
    log_q = tile.student.log_softmax(-1)
    top_q = log_q.argmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    accuracy = (top_q == tile.labels).to(log_q.dtype)
    if merged is not None:
        tile = merged.tile
        log_q = tile.student.log_softmax(-1)
    if tile.teacher is None:
        zero = torch.zeros_like(entropy)
        return torch.stack([zero, entropy, zero, zero, accuracy], dim=-1)
    p, log_p = tile.teacher.probs(), tile.teacher.log_probs()
    kl, teacher_entropy = (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)
    agreement = (top_q == p.argmax(-1) if merged is None else merged.agrees(top_q, p)).to(log_q.dtype)
    return torch.stack([kl, entropy, teacher_entropy, agreement, accuracy], dim=-1)
