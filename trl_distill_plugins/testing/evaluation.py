"""The ways to a loss's values and gradient: naive ones on whole logits, and the engine's."""

from dataclasses import replace

import torch
from torch import Tensor

from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective, Term
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.sparse import SparseSignal, merged_tile
from trl_distill_plugins.losses.tiles import LogitsTile
from trl_distill_plugins.testing.cases import Case

Evaluated = tuple[Tensor, Tensor]


def named(case: Case, ids: Tensor) -> SparseSignal:
    """What the case's teacher says if it names only the tokens `ids`, `[n, k]`."""
    return SparseSignal(ids, case.teacher.log_softmax(-1).gather(1, ids))


def merged(loss: Loss, case: Case, signal: SparseSignal) -> LogitsTile:
    """What the engine shows `loss` of the case with a sparse teacher in the place of its own."""
    tile = LogitsTile(case.student, None, case.labels, case.on_policy)
    return merged_tile(tile, signal, loss.temperature, loss.tail).tile


def values_of(loss: Loss, case: Case, student: Tensor | None = None) -> Tensor:
    """The loss of each token, `[n]`, with temperature and T^2; `student` takes the place of the case's logits."""
    return loss.per_token(case.tile(loss, student)) * loss.scale


def tile_by_autograd(loss: Loss, tile: LogitsTile) -> Evaluated:
    """`per_token` on a tile and the gradient of its sum by `tile.student`, by autograd: `[n]`, `[n, V]`."""
    student = tile.student.detach().clone().requires_grad_()
    return _differentiated(loss.per_token(replace(tile, student=student)), student)


def tile_by_method(loss: Loss, tile: LogitsTile) -> Evaluated:
    """The same from `per_token_and_grad`, called as the engine calls it: without gradients."""
    with torch.no_grad():
        return loss.per_token_and_grad(tile)


def by_autograd(loss: Loss, case: Case) -> Evaluated:
    """The values `[n]` and the gradient of their sum by the student's logits, `[n, V]`, with temperature and T^2."""
    student = case.student.clone().requires_grad_()
    return _differentiated(values_of(loss, case, student), student)


def by_call(loss: Loss, case: Case) -> Evaluated:
    """The same from `loss(student_logits, teacher_logits, labels)`."""
    student = case.student.clone().requires_grad_()
    teacher = case.teacher if loss.needs_teacher else None
    return _differentiated(loss(student, teacher, case.labels), student)


def by_naming(loss: Loss, case: Case, signal: SparseSignal) -> Evaluated:
    """The same with a sparse teacher in the place of the case's, by autograd of `per_token`."""
    student = case.student.clone().requires_grad_()
    return _differentiated(loss.per_token(merged(loss, replace(case, student=student), signal)) * loss.scale, student)


def by_differences(loss: Loss, case: Case, step: float = 1e-6) -> Tensor:
    """The gradient `[n, V]` of the sum of the values by central differences of one logit after the other."""
    gradient = torch.empty_like(case.student)
    with torch.no_grad():
        for at in range(case.student.numel()):
            moved = [case.student.clone() for _ in range(2)]
            moved[0].view(-1)[at] += step
            moved[1].view(-1)[at] -= step
            up, down = (values_of(loss, case, student).sum() for student in moved)
            gradient.view(-1)[at] = (up - down) / (2 * step)
    return gradient


def by_engine(loss: Loss, case: Case, chunk_size: int, weights: Tensor | None = None) -> Evaluated:
    """The sum of the values and its gradient by the logits, `[n, V]`, from `chunked_objective`.

    The head is the identity, so that hidden states are logits. `weights` are per-token factors, `[n]`.
    """
    student = case.student.clone().requires_grad_()
    head, teacher = LMHead(torch.eye(student.shape[-1], dtype=student.dtype)), None
    if loss.needs_teacher:
        teacher = DenseSignal(case.teacher, LMHead(torch.eye(case.teacher.shape[-1], dtype=student.dtype)))
    objective = Objective((Term(loss, 1.0, loss.name),))
    out = chunked_objective(
        objective, student, head, case.labels, teacher,
        weights=weights, on_policy=case.on_policy, chunk_size=chunk_size,
    )  # fmt: skip
    return _differentiated(out.loss, student)


def _differentiated(values: Tensor, student: Tensor) -> Evaluated:
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient
