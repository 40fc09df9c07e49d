"""Several teachers as one: their distributions mixed, or each one's own at some of the positions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import at_least_float32, slab_rows

Mix = Literal["probabilities", "logits"]


@dataclass(frozen=True)
class Part:
    """One teacher's share in a joint signal.

    Args:
        signal: what it says.
        weight: its weight in a mixture; all of them sum to 1.
        rows: of the N positions those it speaks of, `[n]`, ascending; None for all.
    """

    signal: DenseSignal
    weight: float = 1.0
    rows: Tensor | None = None


class JointSignal:
    """What several teachers say about N trained positions. It is read as a `DenseSignal` is.

    Teachers that speak of the same positions are mixed. With "probabilities", `p = sum_i w_i p_i`; with "logits",
    `p = softmax(sum_i w_i z_i)`, their normalised product. Both are taken at T = 1, before a loss's temperature.

    Args:
        parts: every position in all of them, or in exactly one.
        count: N.
        mix: what is weighted.
    """

    # Of a `DenseSignal`: all parts are about the student's vocabulary, and together about all positions.
    vocabulary = None
    covered = None
    is_whole = True

    def __init__(self, parts: Sequence[Part], count: int, mix: Mix = "probabilities") -> None:
        self.parts, self.count, self.mix = tuple(parts), count, mix
        self._buffers: dict[torch.dtype, Tensor] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def head(self) -> LMHead:
        """What is left to do with the logits written here: nothing."""
        return LMHead(self.parts[0].signal.head.weight)

    def width(self, student: int) -> int:
        """How many logits of a position are written: the student's."""
        return student

    @property
    def logits_dtype(self) -> torch.dtype:
        """What the logits are written in."""
        return at_least_float32(self.parts[0].signal.hidden.dtype)

    def map(self, change: Callable[[DenseSignal], DenseSignal]) -> "JointSignal":
        """The same over changed parts: gathered, cast or moved ones."""
        parts = [replace(part, signal=change(part.signal)) for part in self.parts]
        return JointSignal(parts, self.count, self.mix)

    def cast(self, dtype_of: Callable[[Tensor], torch.dtype]) -> "JointSignal":
        """The same signal, each part to be projected in the dtype that `dtype_of` gives for its hidden states."""
        return self.map(lambda signal: signal.cast(dtype_of))

    def on(self, device: torch.device) -> "JointSignal":
        """The same signal on another device."""
        moved = self.map(lambda signal: signal.on(device))
        parts = [replace(part, rows=None if part.rows is None else part.rows.to(device)) for part in moved.parts]
        return JointSignal(parts, self.count, self.mix)

    def finite_rows(self) -> Tensor:
        """Whether all that was said of a position is finite, `[N]`."""
        finite = self.parts[0].signal.hidden.new_ones(self.count, dtype=torch.bool)
        for part in self.parts:
            rows = slice(None) if part.rows is None else part.rows
            finite[rows] &= part.signal.finite_rows()
        return finite

    def write_raw_logits(self, start: int, end: int, out: Tensor) -> Tensor:
        """Write the joint logits of positions `start` to `end` into `out` `[end - start, V]`. See `DenseSignal`."""
        is_first = True
        for part in self.parts:
            if part.rows is not None:
                self._write_own(part, part.rows, start, end, out)
            else:
                self._mix_in(part, start, end, out, is_first=is_first)
            is_first = False
        return out

    def _write_own(self, part: Part, rows: Tensor, start: int, end: int, out: Tensor) -> None:
        first, last = torch.searchsorted(rows, rows.new_tensor([start, end])).tolist()
        if last > first:
            raw = part.signal.write_raw_logits(first, last, self._buffer(part.signal, last - first, out))
            out[rows[first:last] - start] = part.signal.head.shape_logits(raw.to(out.dtype))

    def _mix_in(self, part: Part, start: int, end: int, out: Tensor, *, is_first: bool) -> None:
        whole = part.signal.write_raw_logits(start, end, self._buffer(part.signal, end - start, out))
        slab = slab_rows(whole)
        for raw, total in zip(whole.split(slab), out.split(slab), strict=True):
            logits = part.signal.head.shape_logits(raw.to(out.dtype))
            if self.mix == "logits":
                share = logits.mul_(part.weight)
                total.copy_(share) if is_first else total.add_(share)
            else:
                share = logits.sub_(logits.logsumexp(-1, keepdim=True) - math.log(part.weight))
                total.copy_(share) if is_first else torch.logaddexp(total, share, out=total)

    def _buffer(self, signal: DenseSignal, rows: int, like: Tensor) -> Tensor:
        """`[rows, V]` to project into; allocated once, for fresh memory costs as much as a pass over it."""
        dtype = signal.logits_dtype
        if dtype not in self._buffers or len(self._buffers[dtype]) < rows:
            self._buffers[dtype] = like.new_empty(rows, like.shape[1], dtype=dtype)
        return self._buffers[dtype][:rows]


WholeSignal: TypeAlias = DenseSignal | JointSignal
TeacherSignal: TypeAlias = WholeSignal | SparseSignal
