"""Tiles with a sparse teacher on a CPU: a native kernel goes over the vocabulary, the losses see the teacher's classes.

What `tile_gradients` does in eager torch for such a teacher, in two passes over the raw logits: one reads the named
tokens' logits and the logsumexp of all others, one writes the gradient. The losses between them are the same.
"""

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.kernels.cpu import HeadShape, check_labels
from trl_distill_plugins.losses.kernels.sparse import Rows, SparseKernel
from trl_distill_plugins.losses.kernels.terms import KernelTerm
from trl_distill_plugins.losses.objective import Objective, Term
from trl_distill_plugins.losses.sparse import SparseSignal, class_tile, has_rest, likeliest_named
from trl_distill_plugins.losses.statistics import class_statistics
from trl_distill_plugins.losses.tiles import LogitsTile, Tail


def can_run(objective: Objective) -> bool:
    """Whether every term sees the teacher's classes, or is a cross-entropy."""
    return all(term.loss.needs_teacher or _as_cross_entropy(term) is not None for term in objective.tokens)


class SparseTiles:
    """Evaluates an objective that `can_run` on one tile of raw logits after the other."""

    def __init__(self, kernel: SparseKernel, objective: Objective, head: LMHead) -> None:
        self._kernel, self._terms = kernel, [(term, _as_cross_entropy(term)) for term in objective.tokens]
        self._shape = HeadShape(head.scale, head.softcap)
        buckets = {t.loss.temperature for t in objective.tokens if t.loss.needs_teacher and t.loss.tail == "bucket"}
        self._temperatures = [1.0, *sorted(buckets - {1.0})]
        self._want_mean = any(known is not None and known.label_smoothing > 0 for _, known in self._terms)

    def __call__(
        self,
        raw: Tensor,
        signal: SparseSignal,
        tile: LogitsTile,
        token_scale: Tensor,
        values: Tensor,
        statistics: Tensor,
        *,
        want_gradient: bool,
    ) -> None:
        """Evaluate n tokens; all tensors on the CPU.

        Args:
            raw: raw logits `[n, V]`, fp32 or bf16, contiguous; with `want_gradient` overwritten by the gradient of
                `sum_i token_scale_i sum_k weight_k loss_ki` by them.
            signal: the teacher's word on these tokens.
            tile: their labels and who wrote them; its logits are not looked at.
            token_scale: `[n]`, fp32.
            values: `[K, n]`, receives the loss of each term at its temperature, without its weight.
            statistics: `[n, 5]`, receives the columns of `STATISTICS`.
            want_gradient: False to write only values and statistics.

        Raises:
            ValueError: a term is a cross-entropy, and a label is no token.
        """
        ids = torch.where(signal.named, signal.ids, -1).contiguous()
        rows = self._kernel.read(
            raw, ids, tile.labels.contiguous(), self._temperatures, self._shape, want_mean=self._want_mean
        )
        classes, gradient = _Classes(rows, signal, tile, self._temperatures), _Gradient(rows)
        view = classes.at(1.0, "bucket")
        statistics.copy_(class_statistics(view, lambda p: rows.top == likeliest_named(ids, p), rows.top, rows.entropy))
        for row, (term, known) in zip(values, self._terms, strict=True):
            if known is not None:
                row.copy_(_cross_entropy(rows, known, gradient))
                continue
            loss, view = term.loss, classes.at(term.loss.temperature, term.loss.tail)
            if not want_gradient:
                row.copy_(loss.per_token(view))
                continue
            value, by_class = loss.per_token_and_grad(view)
            row.copy_(value)
            gradient.add(by_class, term.weight * loss.scale / loss.temperature, classes.place(loss.temperature))
        if want_gradient:
            gradient.spread(self._kernel, rows, token_scale)


class _Classes:
    """The tile over the teacher's classes, made once for all who see it at the same temperature and tail."""

    def __init__(self, rows: Rows, signal: SparseSignal, tile: LogitsTile, temperatures: list[float]) -> None:
        self._rows, self._signal, self._tile, self._temperatures = rows, signal, tile, temperatures
        self._made: dict[tuple[float, Tail], LogitsTile] = {}

    def place(self, temperature: float) -> int | None:
        """Where in `Rows.rest` this temperature is; None if no loss sees the rest at it."""
        return self._temperatures.index(temperature) if temperature in self._temperatures else None

    def at(self, temperature: float, tail: Tail) -> LogitsTile:
        if (temperature, tail) not in self._made:
            rows, width, rest = self._rows, self._rows.raw.shape[1], None
            if has_rest(self._signal, width, tail):
                rest = rows.rest[self._temperatures.index(temperature)].unsqueeze(-1)
            named = rows.named / temperature
            self._made[temperature, tail] = class_tile(self._tile, self._signal, width, temperature, named, rest)
        return self._made[temperature, tail]


class _Gradient:
    """The objective's gradient, summed over its terms, in the form `SparseKernel.spread` takes."""

    def __init__(self, rows: Rows) -> None:
        self._named, self._rest = torch.zeros_like(rows.named), torch.zeros_like(rows.rest)
        self.on_label = self.everywhere = 0.0

    def add(self, by_class: Tensor, factor: float, place: int | None) -> None:
        """Add `factor` times a gradient by the classes' logits, `[n, k]` or, at the temperature at `place` in
        `Rows.rest`, `[n, k + 1]`."""
        k = self._named.shape[1]
        self._named.add_(by_class[:, :k], alpha=factor)
        if place is not None and by_class.shape[1] > k:
            self._rest[place].add_(by_class[:, k], alpha=factor)

    def spread(self, kernel: SparseKernel, rows: Rows, token_scale: Tensor) -> None:
        kernel.spread(
            rows, self._named, self._rest, token_scale.contiguous(), on_label=self.on_label, everywhere=self.everywhere
        )


def _cross_entropy(rows: Rows, term: KernelTerm, gradient: _Gradient) -> Tensor:
    """`-(1 - s) log q(y) - s / V sum log q`; gradient `q - (1 - s) [v = y] - s / V`."""
    check_labels(rows.labels, rows.raw.shape[1])
    smoothing = term.label_smoothing
    log_q = torch.cat([rows.named, rows.rest[0].unsqueeze(-1)], -1).sub_(rows.log_z.unsqueeze(-1))
    gradient.add(log_q.exp_(), term.weight, 0)
    gradient.on_label -= term.weight * (1 - smoothing)
    gradient.everywhere -= term.weight * smoothing / rows.raw.shape[1]
    return rows.log_z - (1 - smoothing) * rows.label - smoothing * rows.mean


def _as_cross_entropy(term: Term[Loss]) -> KernelTerm | None:
    """The term as the cross-entropy at T = 1 it is; None for any other loss."""
    known = term.loss.kernel_term(term.weight * term.loss.scale)
    return known if known is not None and known.kind == "cross_entropy" and known.temperature == 1.0 else None
