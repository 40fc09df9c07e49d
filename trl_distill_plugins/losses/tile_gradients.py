"""One tile after the other: project it to logits, take the objective's values, statistics and gradient from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.joint import TeacherSignal, WholeSignal
from trl_distill_plugins.losses.kernels.cpu import HeadShape, TileKernel, load_tile_kernel
from trl_distill_plugins.losses.kernels.sparse import load_sparse_kernel
from trl_distill_plugins.losses.kernels.terms import KernelTerm
from trl_distill_plugins.losses.objective import Objective, Term
from trl_distill_plugins.losses.signals import DenseSignal, logits_dtype, project
from trl_distill_plugins.losses.sparse import MergedTile, SparseSignal, merged_tile
from trl_distill_plugins.losses.sparse_tiles import SparseTiles, can_run
from trl_distill_plugins.losses.statistics import STATISTICS, TEACHER_STATISTICS, tile_statistics
from trl_distill_plugins.losses.tiles import LogitsTile, Tail, TeacherTile, at_least_float32, slab_rows
from trl_distill_plugins.losses.vocabulary import SharedTile, shared_tile

_TEACHER_COLUMNS = [STATISTICS.index(column) for column in TEACHER_STATISTICS]


Classes: TypeAlias = Callable[[float, Tail], MergedTile | SharedTile]


@dataclass(frozen=True)
class Job:
    """What `chunked_objective` was asked for."""

    objective: Objective
    head: LMHead
    labels: Tensor
    teacher: TeacherSignal | None
    weights: Tensor
    on_policy: Tensor | None
    normalizer: Tensor | float
    chunk_size: int
    grad_enabled: bool
    divides_late: bool  # fp16 gradients are divided in backward, once the loss scaler has enlarged them: they underflow


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype products run in: autocast's, or the hidden states' own."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class Tiles:
    """Projects and differentiates one tile after the other in buffers allocated once."""

    def __init__(self, job: Job, hidden: Tensor, weight: Tensor, bias: Tensor | None, want_gradient: bool) -> None:
        dtype = compute_dtype(hidden)
        self.job, self.want_gradient = job, want_gradient
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        rows = min(job.chunk_size, max(1, hidden.shape[0]))
        self._student = hidden.new_empty(rows, weight.shape[0], dtype=logits_dtype(self.hidden))
        self._teacher = None
        if isinstance(job.teacher, WholeSignal):
            width = job.teacher.width(weight.shape[0])
            self._teacher = hidden.new_empty(rows, width, dtype=job.teacher.logits_dtype)
        value_dtype = at_least_float32(dtype)
        self.values = hidden.new_empty(len(job.objective.tokens), hidden.shape[0], dtype=value_dtype)
        self.statistics = hidden.new_empty(hidden.shape[0], len(STATISTICS), dtype=value_dtype)
        self.token_scale = (job.weights / (1.0 if job.divides_late else job.normalizer)).to(value_dtype)
        self._kernel, self._kernel_terms = _kernel_for(job, self._student, self._teacher), _kernel_terms(job.objective)
        self._sparse = _sparse_tiles_for(job, self._student)

    def run(self, start: int) -> tuple[Tensor, Tensor]:
        """Fill values and statistics of the tile at `start`; return its hidden states and gradient by raw logits."""
        end = min(start + self.job.chunk_size, self.hidden.shape[0])
        hidden, raw = self.hidden[start:end], self._student[: end - start]
        project(hidden, self.weight, self.bias, raw)
        teacher_raw = None
        if isinstance(self.job.teacher, WholeSignal) and self._teacher is not None:
            teacher_raw = self.job.teacher.write_raw_logits(start, end, self._teacher[: end - start])
        if self._sparse is not None and isinstance(self.job.teacher, SparseSignal):
            self._native_sparse(self._sparse, self.job.teacher, slice(start, end), raw)
            return hidden, raw
        if self._kernel is not None:
            self._native(self._kernel, slice(start, end), raw, teacher_raw)
        if self._kernel is None or self._kernel_terms is None:
            self._eager(start, raw, teacher_raw)
        return hidden, raw.to(hidden.dtype)

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the terms and the statistics, summed over all tiles."""
        objective, weights = self.job.objective, self.job.weights.to(self.values.dtype)
        scales = self.values.new_tensor([term.loss.scale for term in objective.tokens])
        shares = self.values.new_tensor([term.weight for term in objective.tokens])
        terms = (self.values @ weights) * scales
        return terms @ shares / self.job.normalizer, terms, self.statistics.sum(0)

    def _native(self, kernel: TileKernel, tokens: slice, raw: Tensor, teacher_raw: Tensor | None) -> None:
        """Values, statistics and gradient; the statistics alone where the kernel does not know a loss."""
        head, teacher_head, terms = self.job.head, _teacher_head(self.job), self._kernel_terms or []
        kernel(
            raw,
            teacher_raw,
            self.job.labels[tokens],
            self.token_scale[tokens],
            terms,
            self.values[: len(terms), tokens],
            self.statistics[tokens],
            student_shape=HeadShape(head.scale, head.softcap),
            teacher_shape=HeadShape(teacher_head.scale, teacher_head.softcap),
            want_gradient=self.want_gradient and bool(terms),
        )

    def _native_sparse(self, tiles: SparseTiles, teacher: SparseSignal, tokens: slice, raw: Tensor) -> None:
        on_policy = None if self.job.on_policy is None else self.job.on_policy[tokens]
        tiles(
            raw,
            teacher[tokens],
            LogitsTile(raw, None, self.job.labels[tokens], on_policy),
            self.token_scale[tokens],
            self.values[:, tokens],
            self.statistics[tokens],
            want_gradient=self.want_gradient,
        )

    def _eager(self, start: int, raw: Tensor, teacher_raw: Tensor | None) -> None:
        slab = slab_rows(raw)
        for first in range(0, len(raw), slab):
            rows = slice(first, first + slab)
            tokens = slice(start + first, start + min(first + slab, len(raw)))
            self._eager_rows(tokens, raw[rows], None if teacher_raw is None else teacher_raw[rows])

    def _eager_rows(self, tokens: slice, raw: Tensor, teacher_raw: Tensor | None) -> None:
        job, dtype, head = self.job, self.values.dtype, self.job.head
        teacher = None
        if teacher_raw is not None:
            teacher = TeacherTile(_teacher_head(job).shape_logits(teacher_raw.to(dtype)))
        on_policy = None if job.on_policy is None else job.on_policy[tokens]
        tile = LogitsTile(head.shape_logits(raw.to(dtype)), teacher, job.labels[tokens], on_policy)
        classes, silent = _classes(tile, job.teacher, tokens), _silent(job.teacher, tokens)
        if self._kernel is None:
            self.statistics[tokens] = tile_statistics(tile, None if classes is None else classes(1.0, "bucket"))
        if silent is not None:
            self.statistics[tokens][:, _TEACHER_COLUMNS] = self.statistics[tokens][:, _TEACHER_COLUMNS].masked_fill(
                silent, 0
            )
        total: Tensor | None = None
        for row, term in zip(self.values, job.objective.tokens, strict=True):
            values, gradient = self._evaluate(term, tile, classes)
            if silent is not None and term.loss.needs_teacher:
                values = values.masked_fill(silent.squeeze(-1), 0.0)
                gradient = None if gradient is None else gradient.masked_fill_(silent, 0.0)
            row[tokens] = values
            if gradient is not None:
                factor = term.weight * term.loss.scale / term.loss.temperature
                total = gradient.mul_(factor) if total is None else total.add_(gradient, alpha=factor)
        if total is not None:
            raw.copy_(head.shape_gradient(raw.to(dtype), total).mul_(self.token_scale[tokens].unsqueeze(-1)))

    def _evaluate(self, term: Term[Loss], tile: LogitsTile, classes: Classes | None) -> tuple[Tensor, Tensor | None]:
        """Values of a term and its gradient by the student's logits at the term's temperature."""
        merged: MergedTile | SharedTile | None = None
        sees_all = term.loss.any_vocabulary and not isinstance(self.job.teacher, SparseSignal)
        if classes is not None and term.loss.needs_teacher and not sees_all:
            merged = classes(term.loss.temperature, term.loss.tail)
        view = tile.at_temperature(term.loss.temperature) if merged is None else merged.tile
        if not self.want_gradient:
            return term.loss.per_token(view), None
        values, gradient = term.loss.per_token_and_grad(view)
        return values, gradient if merged is None else merged.spread(gradient)


def _teacher_head(job: Job) -> LMHead:
    return job.teacher.head if isinstance(job.teacher, WholeSignal) else job.head


def _classes(tile: LogitsTile, teacher: TeacherSignal | None, tokens: slice) -> Classes | None:
    """The tile over fewer classes than tokens, where the teacher has no logits of the student's; made once for all who
    see it at the same temperature and with the same tail."""
    if isinstance(teacher, SparseSignal):
        return cache(partial(merged_tile, tile, teacher[tokens]))
    if teacher is None or teacher.vocabulary is None:
        return None
    return cache(partial(shared_tile, tile, teacher.vocabulary))


def _silent(teacher: TeacherSignal | None, tokens: slice) -> Tensor | None:
    """Where the teacher says nothing, `[n, 1]`; None for nowhere."""
    covered = teacher.covered if isinstance(teacher, DenseSignal) else None
    return None if covered is None else ~covered[tokens, None]


def _kernel_for(job: Job, student: Tensor, teacher: Tensor | None) -> TileKernel | None:
    """The native kernel, if it works on such a teacher and the dtypes at hand."""
    teacher_is_whole = job.teacher is None or (not isinstance(job.teacher, SparseSignal) and job.teacher.is_whole)
    if not teacher_is_whole or not _is_native(student) or not (teacher is None or _is_native(teacher)):
        return None
    return load_tile_kernel()


def _sparse_tiles_for(job: Job, student: Tensor) -> SparseTiles | None:
    """The native way through tiles with a sparse teacher, if it knows all losses and the dtype at hand."""
    if not (isinstance(job.teacher, SparseSignal) and _is_native(student) and can_run(job.objective)):
        return None
    kernel = load_sparse_kernel()
    return None if kernel is None else SparseTiles(kernel, job.objective, job.head)


def _is_native(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16)


def _kernel_terms(objective: Objective) -> list[KernelTerm] | None:
    """The terms as the native kernel knows them; None if there is a loss it does not know."""
    terms = [term.loss.kernel_term(term.weight * term.loss.scale) for term in objective.tokens]
    known = [term for term in terms if term is not None]
    return known if len(known) == len(terms) else None
