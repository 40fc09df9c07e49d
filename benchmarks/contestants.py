"""What the benchmark of the loss engine compares: the objectives, and the ways to get their gradients.

Every method gets the student's hidden states and head and the teacher's, or what a sparse teacher said, and returns the
gradients by the student's hidden states and head weight.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from measuring import Gradients, Inputs
from torch import Tensor

from trl_distill_plugins import plugins
from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.chunked import chunked_objective
from trl_distill_plugins.losses.head import LMHead
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile, teacher_of, through_softmax

NAMED_TOKENS = 64
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # the peers' name of the loss

Signal = DenseSignal | SparseSignal | None


class SquaredHellinger(Loss):
    """`1 - sum_v sqrt(p_v q_v)`, as somebody would write it who has read the README."""

    name = "squared_hellinger"
    is_divergence = True

    def per_token(self, tile: LogitsTile) -> Tensor:
        return 1 - ((teacher_of(tile).log_probs() + tile.student.log_softmax(-1)) / 2).exp().sum(-1)


class ClosedSquaredHellinger(SquaredHellinger):
    """The same with its gradient: with `w = -sqrt(p q) / 2`, `w - q sum w`."""

    name = "squared_hellinger_closed"

    def per_token_and_grad(self, tile: LogitsTile) -> tuple[Tensor, Tensor]:
        log_q = tile.student.log_softmax(-1)
        roots = teacher_of(tile).log_probs().add_(log_q).div_(2).exp_()
        return 1 - roots.sum(-1), through_softmax(log_q.exp_(), roots.div_(-2))


@dataclass(frozen=True)
class Case:
    """One objective on one form of teacher."""

    title: str
    losses: tuple[Any, ...]
    teacher: Literal["dense", "none", "top_k", "sampled"] = "dense"

    @property
    def objective(self) -> Objective:
        return Objective.from_config(self.losses)

    @property
    def has_teacher_product(self) -> bool:
        return self.teacher == "dense"


def dense_cases() -> list[Case]:
    """Every installed token loss with its default options, then one of a third party, without and with closed form."""
    classes = [record.cls for record in plugins.installed("losses") if issubclass(record.cls, Loss)]
    cases = [Case(cls.name, (cls.name,), "dense" if cls.needs_teacher else "none") for cls in classes]
    return cases + [Case(loss.name, (loss,)) for loss in (SquaredHellinger(), ClosedSquaredHellinger())]


def sparse_cases() -> list[Case]:
    """Teachers that name 64 tokens of a position."""
    names = ("forward_kl", "reverse_kl", "jsd", "total_variation")
    cases = [Case(f"{name}, top {NAMED_TOKENS}", (name,), "top_k") for name in names]
    mixed = Case(f"forward_kl, top {NAMED_TOKENS}, + cross_entropy", ("forward_kl", "cross_entropy"), "top_k")
    return [*cases, Case(f"forward_kl, {NAMED_TOKENS} sampled", ("forward_kl",), "sampled"), mixed]


@torch.no_grad()
def sparse_signal(inputs: Inputs, form: Literal["top_k", "sampled"]) -> SparseSignal:
    """What a stored teacher says: its likeliest tokens, or as many draws."""
    k, picked = min(NAMED_TOKENS, len(inputs.weight)), []
    for hidden in inputs.teacher_hidden.split(64):
        log_probs = (hidden @ inputs.teacher_weight.t()).log_softmax(-1)
        gen = torch.Generator().manual_seed(0)
        ids = log_probs.topk(k).indices if form == "top_k" else log_probs.exp().multinomial(k, generator=gen)
        picked.append((ids, log_probs.gather(1, ids)))
    ids, log_probs = (torch.cat(parts) for parts in zip(*picked, strict=True))
    return SparseSignal(ids, log_probs, torch.full_like(log_probs, 1 / k) if form == "sampled" else None)


def signal_of(inputs: Inputs, case: Case) -> Signal:
    """The teacher of `case`; a sparse one is made here, before anything is timed."""
    if case.teacher == "none":
        return None
    if case.teacher == "dense":
        return DenseSignal(inputs.teacher_hidden, LMHead(inputs.teacher_weight))
    return sparse_signal(inputs, case.teacher)


def ours(inputs: Inputs, case: Case, signal: Signal) -> Gradients:
    """The chunked engine."""
    head, on_policy, count = LMHead(inputs.weight), inputs.on_policy, len(inputs.labels)
    output = chunked_objective(
        case.objective, inputs.hidden, head, inputs.labels, signal, normalizer=count, on_policy=on_policy
    )
    return inputs.backward(output.loss)


def naive(inputs: Inputs, case: Case, signal: Signal) -> Gradients:
    """The losses' formulas on full logits, the rest left to autograd."""
    student, teacher = inputs.hidden @ inputs.weight.t(), None
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    if isinstance(signal, DenseSignal):
        teacher = TeacherTile((inputs.teacher_hidden @ inputs.teacher_weight.t()).to(student.dtype))
    tile, total = LogitsTile(student, teacher, inputs.labels, inputs.on_policy), student.new_zeros(())
    for term in case.objective.terms:
        is_sparse = isinstance(signal, SparseSignal)
        values = term.loss(student, signal, inputs.labels) if is_sparse else term.loss.per_token(tile)
        total = total + values.mean()
    return inputs.backward(total)


def trl_full_logits(inputs: Inputs, case: Case, _: Signal) -> Gradients:
    """TRL's GKD trainer, on full logits."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = inputs.hidden @ inputs.weight.t(), inputs.teacher_hidden @ inputs.teacher_weight.t()
    return inputs.backward(GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETAS[case.title]))


def trl_chunked(inputs: Inputs, case: Case, _: Signal) -> Gradients:
    """TRL's kernels, which on a CPU are torch."""
    if case.title == "cross_entropy":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        head = inputs.weight, None, inputs.labels
        log_q, *_ = ChunkedLogProbFunction.apply(inputs.hidden, *head, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        return inputs.backward(-log_q.mean())
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.teacher_hidden, inputs.teacher_weight, None, BETAS[case.title]
    )
    return inputs.backward(divergence.mean())


def liger_chunked(inputs: Inputs, case: Case, _: Signal) -> Gradients:
    """Liger's chunked loss; its fused cross-entropy needs Triton and has no row here."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[case.title], compiled=False
    )
    head = inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    return inputs.backward(function(inputs.hidden, *head, inputs.labels))


Method = Callable[[Inputs, Case, Signal], Gradients]
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
METHODS: dict[str, Method] = {
    "ours": ours,
    "naive": naive,
    "TRL GKD": trl_full_logits,
    "TRL chunked": trl_chunked,
    **({"Liger chunked": liger_chunked} if HAS_LIGER else {}),
}


def peers_of(case: Case) -> list[str]:
    """The methods of other projects that have the loss of `case`."""
    if case.title == "cross_entropy":
        return ["TRL chunked"]
    return [name for name in METHODS if name not in ("ours", "naive")] if case.title in BETAS else []


def reference_gradients(inputs: Inputs, case: Case, dtype: torch.dtype) -> Gradients:
    """`naive` in `dtype`, 64 tokens at a time only to bound this script's own memory."""
    signal, exact = signal_of(inputs, case), inputs.to(dtype)
    of_hidden, of_weight = torch.zeros_like(exact.hidden), torch.zeros_like(exact.weight)
    for start in range(0, len(exact.hidden), 64):
        rows = slice(start, start + 64)
        tile = exact[rows]
        part = naive(tile, case, signal[rows] if isinstance(signal, SparseSignal) else signal)
        share = len(tile.hidden) / len(exact.hidden)
        of_hidden[rows] = part[0] * share
        of_weight.add_(part[1], alpha=share)
    return of_hidden, of_weight
