"""The chunked engine: an objective over hidden states, one tile of tokens at a time, without `[N, V]` logits.

Each tile is projected to logits once, by each model. Its loss and its gradient come from those logits, and the gradient
goes on at once into `grad hidden` and `grad weight`; backward only hands out what is there. That makes four matrix
products in all - student logits, teacher logits, grad hidden, grad weight - and none is repeated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.joint import TeacherSignal
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.sparse import SparseSignal, check_signal
from trl_distill_plugins.losses.tile_gradients import Job, Tiles, compute_dtype
from trl_distill_plugins.losses.tiles import at_least_float32
from trl_distill_plugins.losses.vocabulary import check_shared

DEFAULT_CHUNK_SIZE = 256
# On a CPU, so many rows of a half-precision product are added to the fp32 gradient of the weight while in its cache.
_SLAB = 2048


class ObjectiveOutput(NamedTuple):
    """What `chunked_objective` returns.

    Args:
        loss: scalar, `sum_i w_i sum_k weight_k T_k^2 loss_ki / normalizer`, differentiable.
        terms: `[K]`, `sum_i w_i T_k^2 loss_ki` of each of `Objective.tokens`; detached.
        statistics: `[5]`, sums over the tokens of the columns in `STATISTICS`; detached.
        tokens: N.
        covered: the tokens of which the teacher says something: N, but where its tokenizer is another.
    """

    loss: Tensor
    terms: Tensor
    statistics: Tensor
    tokens: int
    covered: Tensor | int


def chunked_objective(
    objective: Objective,
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    teacher: TeacherSignal | None = None,
    *,
    normalizer: Tensor | float = 1.0,
    weights: Tensor | None = None,
    on_policy: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> ObjectiveOutput:
    """Evaluate the losses on logits of `objective`, and the statistics, on N trained tokens.

    Args:
        objective: the weighted sum of losses.
        hidden: the student's last hidden states at the trained positions, `[N, H]`.
        head: the student's head, `[V, H]`. A weight that needs no gradient (LoRA, frozen head) costs no product.
        labels: the tokens that follow those positions, `[N]`.
        teacher: the teacher's view of the same positions; needed if the objective has a divergence.
        normalizer: what the sum is divided by: the number of trained tokens of the whole global batch.
        weights: per-token factors `[N]`, default 1.
        on_policy: whether the student itself wrote the token, `[N]`, bool; None where it wrote none.
        chunk_size: tokens a tile. The peak holds about two `[chunk_size, V]` tiles.

    Under autocast the products run in its dtype; otherwise in the hidden states' own.
    """
    if objective.needs_teacher and teacher is None:
        raise ValueError("the objective compares the student with a teacher, and no teacher signal was given")
    if teacher is not None and len(teacher) != hidden.shape[0]:
        raise ValueError(f"the teacher's signal covers {len(teacher)} positions, the student trains {hidden.shape[0]}")
    if isinstance(teacher, SparseSignal):
        check_signal(teacher, [term.loss for term in objective.tokens], head.weight.shape[0])
    elif teacher is not None:
        if teacher.vocabulary is not None:
            widths = head.weight.shape[0], teacher.head.weight.shape[0]
            check_shared(teacher.vocabulary, [term.loss for term in objective.tokens], *widths)
        teacher = teacher.cast(compute_dtype)
    scale = torch.ones_like(labels, dtype=at_least_float32(hidden.dtype)) if weights is None else weights
    is_fp16 = compute_dtype(hidden) == torch.float16
    job = Job(
        objective, head, labels, teacher, scale, on_policy, normalizer, chunk_size, torch.is_grad_enabled(), is_fp16
    )
    loss, terms, statistics = _ChunkedObjective.apply(hidden, head.weight, head.bias, job)
    covered = None if teacher is None or isinstance(teacher, SparseSignal) else teacher.covered
    return ObjectiveOutput(
        loss, terms, statistics, hidden.shape[0], hidden.shape[0] if covered is None else covered.sum()
    )


class _Gradients:
    """Accumulates the gradients by hidden states, head weight and head bias; skips those nobody needs."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool], *, has_tiles: bool
    ) -> None:
        # The first tile writes the weight's gradient, the others add to it: no pass of zeros before.
        make = torch.empty_like if has_tiles else torch.zeros_like
        self.hidden = make(hidden) if needed[0] else None
        self.weight = make(weight, dtype=at_least_float32(weight.dtype)) if needed[1] else None
        self.bias = None
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=at_least_float32(bias.dtype))

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


class _ChunkedObjective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = tuple(job.grad_enabled and need for need in ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        # Without a token loss the gradients are zeros rather than absent: DDP waits for one of every parameter.
        want_gradient = any(needed) and len(job.objective.tokens) > 0
        tiles = Tiles(job, hidden, weight, bias, want_gradient=want_gradient)
        has_tiles = want_gradient and len(hidden) > 0
        gradients = _Gradients(hidden, weight, bias, needed, has_tiles=has_tiles)  # type: ignore[arg-type]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], job.chunk_size):
                tile_hidden, gradient = tiles.run(start)
                if want_gradient:
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
