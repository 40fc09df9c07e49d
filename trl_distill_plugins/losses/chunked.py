"""The chunked engine: an objective over hidden states, one tile of tokens at a time, without `[N, V]` logits.

Each tile is projected to logits once, by each model. Its loss and its gradient come from those logits, and the gradient
goes on at once into `grad hidden` and `grad weight`; backward only hands out what is there. That makes four matrix
products in all - student logits, teacher logits, grad hidden, grad weight - and none is repeated.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import LogitsTile, TeacherTile
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.kernels.cpu import HeadShape, TileKernel, load_tile_kernel
from trl_distill_plugins.losses.kernels.terms import KernelTerm
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal, logits_dtype, project
from trl_distill_plugins.losses.statistics import STATISTICS, tile_statistics

DEFAULT_CHUNK_SIZE = 256
# On a CPU, so many rows of a half-precision product are added to the fp32 gradient of the weight while in its cache.
_SLAB = 2048


class ObjectiveOutput(NamedTuple):
    """What `chunked_objective` returns.

    Args:
        loss: scalar, `sum_i w_i sum_k weight_k T_k^2 loss_ki / normalizer`, differentiable.
        terms: `[K]`, each term's `sum_i w_i T_k^2 loss_ki`; detached.
        statistics: `[5]`, sums over the tokens of the columns in `STATISTICS`; detached.
        tokens: N.
    """

    loss: Tensor
    terms: Tensor
    statistics: Tensor
    tokens: int


def chunked_objective(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    teacher: DenseSignal | None = None,
    *,
    normalizer: Tensor | float = 1.0,
    weights: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> ObjectiveOutput:
    """Evaluate `objective` on N trained tokens.

    Args:
        objective: the weighted sum of losses.
        hidden: the student's last hidden states at the trained positions, `[N, H]`.
        head: the student's head, `[V, H]`. A weight that needs no gradient (LoRA, frozen head) costs no product.
        labels: the tokens that follow those positions, `[N]`.
        teacher: the teacher's view of the same positions; needed if the objective has a divergence.
        normalizer: what the sum is divided by: the number of trained tokens of the whole global batch.
        weights: per-token factors `[N]`, default 1.
        chunk_size: tokens a tile. The peak holds about two `[chunk_size, V]` tiles.

    Under autocast the products run in its dtype; otherwise in the hidden states' own.
    """
    if objective.needs_teacher and teacher is None:
        raise ValueError("the objective compares the student with a teacher, and no teacher signal was given")
    if teacher is not None and len(teacher) != hidden.shape[0]:
        raise ValueError(f"the teacher's signal covers {len(teacher)} positions, the student trains {hidden.shape[0]}")
    if teacher is not None:
        teacher = teacher.to(_compute_dtype(teacher.hidden))
    scale = torch.ones_like(labels, dtype=_at_least_float32(hidden.dtype)) if weights is None else weights
    is_fp16 = _compute_dtype(hidden) == torch.float16
    job = _Job(objective, head, labels, teacher, scale, normalizer, chunk_size, torch.is_grad_enabled(), is_fp16)
    loss, terms, statistics = _ChunkedObjective.apply(hidden, head.weight, head.bias, job)
    return ObjectiveOutput(loss, terms, statistics, hidden.shape[0])


@dataclass(frozen=True)
class _Job:
    objective: Objective
    head: LMHead
    labels: Tensor
    teacher: DenseSignal | None
    weights: Tensor
    normalizer: Tensor | float
    chunk_size: int
    grad_enabled: bool
    divides_late: bool  # fp16 gradients are divided in backward, once the loss scaler has enlarged them: they underflow


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _Gradients:
    """Accumulates the gradients by hidden states, head weight and head bias; skips those nobody needs."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        # The first tile writes the weight's gradient, the others add to it: no pass of zeros before.
        make = torch.empty_like if len(hidden) else torch.zeros_like
        self.weight = make(weight, dtype=_at_least_float32(weight.dtype)) if needed[1] else None
        self.bias = None
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=_at_least_float32(bias.dtype))

    def add(self, start: int, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Take in a tile: `gradient` by its raw logits `[n, V]`, its `hidden` `[n, H]`, the head's `weight`."""
        end = start + gradient.shape[0]
        if self.hidden is not None:
            self.hidden[start:end] = gradient @ weight
        if self.weight is not None:
            self._add_to(self.weight, gradient.t(), hidden, is_first=start == 0)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    @staticmethod
    def _add_to(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
        if left.dtype == total.dtype:
            torch.addmm(total, left, right, beta=0 if is_first else 1, out=total)
            return
        slab = _SLAB if total.device.type == "cpu" else len(total)
        for first in range(0, len(total), slab):
            rows = slice(first, first + slab)
            write = total[rows].copy_ if is_first else total[rows].add_
            write(left[rows] @ right)


class _Tiles:
    """Projects and differentiates one tile after the other in buffers allocated once."""

    def __init__(self, job: _Job, hidden: Tensor, weight: Tensor, bias: Tensor | None, want_gradient: bool) -> None:
        dtype = _compute_dtype(hidden)
        self.job, self.want_gradient = job, want_gradient
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        rows = min(job.chunk_size, max(1, hidden.shape[0]))
        self._student = hidden.new_empty(rows, weight.shape[0], dtype=logits_dtype(self.hidden))
        self._teacher = None
        if job.teacher is not None:
            self._teacher = hidden.new_empty(rows, weight.shape[0], dtype=logits_dtype(job.teacher.hidden))
        value_dtype = _at_least_float32(dtype)
        self.values = hidden.new_empty(len(job.objective.terms), hidden.shape[0], dtype=value_dtype)
        self.statistics = hidden.new_empty(hidden.shape[0], len(STATISTICS), dtype=value_dtype)
        self.token_scale = (job.weights / (1.0 if job.divides_late else job.normalizer)).to(value_dtype)
        self._kernel, self._kernel_terms = _kernel_for(job.objective, self._student, self._teacher)

    def run(self, start: int) -> tuple[Tensor, Tensor]:
        """Fill values and statistics of the tile at `start`; return its hidden states and gradient by raw logits."""
        end = min(start + self.job.chunk_size, self.hidden.shape[0])
        hidden, raw = self.hidden[start:end], self._student[: end - start]
        project(hidden, self.weight, self.bias, raw)
        teacher_raw = None
        if self.job.teacher is not None and self._teacher is not None:
            teacher_raw = self.job.teacher.write_raw_logits(start, end, self._teacher[: end - start])
        differentiate = self._eager if self._kernel is None else self._native
        differentiate(slice(start, end), raw, teacher_raw)
        return hidden, raw.to(hidden.dtype)

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the terms and the statistics, summed over all tiles."""
        objective, weights = self.job.objective, self.job.weights.to(self.values.dtype)
        scales = self.values.new_tensor([term.loss.scale for term in objective.terms])
        shares = self.values.new_tensor([term.weight for term in objective.terms])
        terms = (self.values @ weights) * scales
        return terms @ shares / self.job.normalizer, terms, self.statistics.sum(0)

    def _native(self, tokens: slice, raw: Tensor, teacher_raw: Tensor | None) -> None:
        assert self._kernel is not None
        head = self.job.head
        teacher_head = head if self.job.teacher is None else self.job.teacher.head
        self._kernel(
            raw,
            teacher_raw,
            self.job.labels[tokens],
            self.token_scale[tokens],
            self._kernel_terms,
            self.values[:, tokens],
            self.statistics[tokens],
            student_shape=HeadShape(head.scale, head.softcap),
            teacher_shape=HeadShape(teacher_head.scale, teacher_head.softcap),
            want_gradient=self.want_gradient,
        )

    def _eager(self, tokens: slice, raw: Tensor, teacher_raw: Tensor | None) -> None:
        dtype, head, teacher = self.values.dtype, self.job.head, None
        if teacher_raw is not None and self.job.teacher is not None:
            teacher = TeacherTile(self.job.teacher.head.shape_logits(teacher_raw.to(dtype)))
        tile = LogitsTile(head.shape_logits(raw.to(dtype)), teacher, self.job.labels[tokens])
        self.statistics[tokens] = tile_statistics(tile)
        total = torch.zeros_like(tile.student) if self.want_gradient else None
        for row, term in zip(self.values, self.job.objective.terms, strict=True):
            view = tile.at_temperature(term.loss.temperature)
            if total is None:
                row[tokens] = term.loss.per_token(view)
                continue
            row[tokens], gradient = term.loss.per_token_and_grad(view)
            total.add_(gradient, alpha=term.weight * term.loss.scale / term.loss.temperature)
        if total is not None:
            raw.copy_(head.shape_gradient(raw.to(dtype), total).mul_(self.token_scale[tokens].unsqueeze(-1)))


def _kernel_for(
    objective: Objective, student: Tensor, teacher: Tensor | None
) -> tuple[TileKernel | None, list[KernelTerm]]:
    """The native kernel and its terms, if it knows every loss of the objective and the dtypes at hand."""
    terms = [term.loss.kernel_term(term.weight * term.loss.scale) for term in objective.terms]
    dtypes = {student.dtype} if teacher is None else {student.dtype, teacher.dtype}
    known = [term for term in terms if term is not None]
    if student.device.type != "cpu" or not dtypes <= {torch.float32, torch.bfloat16} or len(known) < len(terms):
        return None, []
    return load_tile_kernel(), known


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = tuple(job.grad_enabled and need for need in ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        tiles = _Tiles(job, hidden, weight, bias, want_gradient=any(needed))
        gradients = _Gradients(hidden, weight, bias, needed)  # type: ignore[arg-type]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], job.chunk_size):
                tile_hidden, gradient = tiles.run(start)
                if any(needed):
                    gradients.add(start, gradient, tile_hidden, tiles.weight)
            loss, terms, statistics = tiles.totals()
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)  # type: ignore[arg-type]
        ctx.divisor = job.normalizer if job.divides_late else 1.0  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(terms, statistics)
        return loss, terms, statistics

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad_loss = grad_loss / ctx.divisor  # type: ignore[attr-defined]
        is_one = grad_loss.item() == 1.0
        hidden, weight, bias = (
            grad if grad is None or is_one else grad * grad_loss
            for grad in ctx.saved_tensors  # type: ignore[attr-defined]
        )
        return hidden, weight, bias, None
