"""What a teacher says about N trained positions, in the form the chunked engine reads tile by tile."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.layers import LayerStates
from trl_distill_plugins.losses.vocabulary import SharedVocabulary


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole next-token distribution, as hidden states and the head that turns them into logits.

    Args:
        hidden: `[N, H_t]`, one row per trained position, in the student's order.
        head: the teacher's head. Its vocabulary may be padded to another width than the student's.
        layers: the layers a hidden loss asked for, see `Teacher.show_layers`.
        vocabulary: what the teacher's tokens have in common with the student's; None where they are the same.
        covered: `[N]`, bool: False where the teacher says nothing, and losses that read it are 0. None for nowhere.
    """

    hidden: Tensor
    head: LMHead
    layers: LayerStates = field(default_factory=LayerStates)
    vocabulary: SharedVocabulary | None = None
    covered: Tensor | None = None

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def logits_dtype(self) -> torch.dtype:
        """What its logits are projected into."""
        return logits_dtype(self.hidden)

    def cast(self, dtype_of: Callable[[Tensor], torch.dtype]) -> "DenseSignal":
        """The same signal, to be projected in the dtype that `dtype_of` gives for its hidden states."""
        dtype = dtype_of(self.hidden)
        return self if dtype == self.hidden.dtype else replace(self, hidden=self.hidden.to(dtype))

    def finite_rows(self) -> Tensor:
        """Whether what was said of a position is finite, `[N]`."""
        return self.hidden.isfinite().all(-1)

    def on(self, device: torch.device) -> "DenseSignal":
        """The same signal on another device; itself where it is there already."""
        head = self.head
        bias = None if head.bias is None else head.bias.to(device)
        moved = head.with_tensors(head.weight.to(device), bias)
        vocabulary = None if self.vocabulary is None else self.vocabulary.on(device)
        covered = None if self.covered is None else self.covered.to(device)
        return DenseSignal(self.hidden.to(device), moved, self.layers.on(device), vocabulary, covered)

    @property
    def is_whole(self) -> bool:
        """Whether it is about the student's vocabulary, at all positions."""
        return self.vocabulary is None and self.covered is None

    def width(self, student: int) -> int:
        """How many logits of a position are read: the `student`'s, or all of the teacher's own vocabulary."""
        return student if self.vocabulary is None else self.head.weight.shape[0]

    @cached_property
    def _cast_head(self) -> tuple[Tensor, Tensor | None]:
        bias = self.head.bias
        return self.head.weight.to(self.hidden.dtype), None if bias is None else bias.to(self.hidden.dtype)

    def write_raw_logits(self, start: int, end: int, out: Tensor) -> Tensor:
        """Write the logits of positions `start` to `end`, before scale and soft cap, into `out` `[end - start, V]`.

        V is `width`. Columns the teacher lacks become -inf (no mass), columns only the teacher has
        are left out, so that the rest is renormalised.
        """
        weight, bias = self._cast_head
        width = min(out.shape[1], weight.shape[0])
        project(self.hidden[start:end], weight[:width], None if bias is None else bias[:width], out[:, :width])
        out[:, width:] = -torch.inf
        return out


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`out = hidden @ weight.T + bias`; `[n, H]`, `[V, H]`, `[V]`. `out` may be fp32 for half-precision factors."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    if bias is not None:
        out += bias


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype logits are projected into: fp32 from half precision where the device's matmul can, else unchanged."""
    half = hidden.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and hidden.device.type == "cuda" else hidden.dtype
