"""What a token loss sees: a tile of n positions, the student's logits and the teacher's word on the same positions."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

TeacherForm = Literal["dense", "top_k", "sampled", "text"]
Tail = Literal["bucket", "renormalise"]

# Eager torch on a CPU works on so many logits at a time: its intermediate results then stay in the second-level cache.
_SLAB_LOGITS = 1 << 18
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slab_rows(logits: Tensor) -> int:
    """How many rows of `logits` `[n, V]` eager torch works on at a time: on a CPU a few, else all."""
    return len(logits) if logits.device.type != "cpu" else max(1, _SLAB_LOGITS // logits.shape[1])


def match_width(logits: Tensor, width: int) -> Tensor:
    """Bring `[..., V_t]` to `[..., width]`: cut the columns beyond it, or add columns without mass (-inf)."""
    return torch.nn.functional.pad(logits, (0, width - logits.shape[-1]), value=-math.inf)


class TeacherTile:
    """The teacher's view of one tile: logits `[n, V]`, already at the temperature the loss asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_probs(self) -> Tensor:
        """`log p`, `[n, V]`, at least -87.3, the log of the smallest normal fp32 number: `q log p` stays finite where
        the teacher has no mass (logit -inf)."""
        return self.logits.log_softmax(-1).clamp_min(LOG_TINY)

    def probs(self) -> Tensor:
        """`p`, `[n, V]`. Exactly zero for tokens the teacher cannot produce."""
        return self.logits.softmax(-1)


class SampledTeacherTile(TeacherTile):
    """Tokens drawn from the teacher: `weights` `[n, V]`, the share of the draws each got, estimate p without bias;
    `log_probs` are the teacher's own."""

    def __init__(self, log_probs: Tensor, weights: Tensor) -> None:
        super().__init__(log_probs)
        self._weights = weights

    def log_probs(self) -> Tensor:
        """The teacher's `log p` of the drawn tokens, `[n, V]`, at least -87.3."""
        return self.logits.clamp_min(LOG_TINY)

    def probs(self) -> Tensor:
        """The share of the draws each token got, `[n, V]`."""
        return self._weights


@dataclass
class LogitsTile:
    """A tile of n trained tokens. With a teacher of whole distributions, its V columns are the vocabulary; with a
    sparse one, the tokens it named and, last, all others as one (see `losses.sparse`); with one of another vocabulary,
    what both have and, last, all others (see `losses.vocabulary`).

    Args:
        student: logits `[n, V]`, at the loss's temperature.
        teacher: the teacher's view of the same positions, or None when the objective has no teacher. A loss of
            `any_vocabulary` sees it over the teacher's own vocabulary.
        labels: the token that follows each position, `[n]`; an index into the vocabulary.
        on_policy: whether the student itself wrote that token, `[n]`; None where it wrote none of them.
    """

    student: Tensor
    teacher: TeacherTile | None
    labels: Tensor
    on_policy: Tensor | None = None

    def at_temperature(self, temperature: float) -> "LogitsTile":
        """The same tile with both sets of logits divided by `temperature`."""
        if temperature == 1.0:
            return self
        teacher = None if self.teacher is None else TeacherTile(self.teacher.logits / temperature)
        return replace(self, student=self.student / temperature, teacher=teacher)


def teacher_of(tile: LogitsTile) -> TeacherTile:
    """The tile's teacher; a `ValueError` where there is none."""
    if tile.teacher is None:
        raise ValueError("this loss compares the student with a teacher, and the tile has none")
    return tile.teacher


def through_softmax(q: Tensor, weighted: Tensor) -> Tensor:
    """Return the gradient by logits z, `[n, V]`, of a sum over v of terms in `q = softmax(z)`.

    Args:
        q: `[n, V]`.
        weighted: `q_v` times the derivative of the sum by `q_v`, `[n, V]`; overwritten.
    """
    return weighted.sub_(q * weighted.sum(-1, keepdim=True))
