"""Which tokens of a teacher's distribution are kept: the likeliest ones, or some drawn from it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import TeacherForm


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens, or fewer: as hold the mass m, or as are likely enough. The likeliest one is always kept.

    Args:
        k: at most so many, 1 or more.
        mass: the smallest set that holds this much of the teacher's mass is enough, above 0 and at most 1.
        min_prob: tokens less likely than this are left out, 0 to 1.
    """

    k: int = 64
    mass: float = 1.0
    min_prob: float = 0.0

    def __post_init__(self) -> None:
        check_range("top_k", self.k, at_least=1)
        check_range("top_mass", self.mass, above=0.0, at_most=1.0)
        check_range("min_prob", self.min_prob, at_least=0.0, at_most=1.0)

    form: ClassVar[TeacherForm] = "top_k"
    draws: ClassVar[None] = None

    def __call__(self, logits: Tensor, generator: torch.Generator) -> SparseSignal:
        """Name tokens of each position from logits `[n, V]`, fp32. `generator` is not used."""
        width = logits.shape[-1]
        if self.k > width:
            raise ConfigError(f"top_k is {self.k}, and the teacher's vocabulary has {width} tokens")
        log_probs, ids = logits.log_softmax(-1).topk(self.k)
        return self._kept(log_probs, ids)

    def of_named(self, signal: SparseSignal) -> SparseSignal:
        """What is kept where a teacher named tokens itself, its likeliest."""
        log_probs, order = signal.log_probs.topk(min(self.k, signal.log_probs.shape[1]))
        return self._kept(log_probs, signal.ids.gather(1, order))

    def _kept(self, log_probs: Tensor, ids: Tensor) -> SparseSignal:
        """Those of some tokens that are wanted, the likeliest of each position first."""
        probs = log_probs.exp()
        left_out = probs < self.min_prob
        if self.mass < 1:
            left_out |= probs.cumsum(-1).roll(1, -1) >= self.mass
        left_out[:, 0] = False
        return SparseSignal(ids, log_probs.masked_fill(left_out, -torch.inf))


@dataclass(frozen=True)
class Samples:
    """Tokens drawn from the teacher with replacement, so that a loss linear in p stays unbiased (2503.16870).

    Args:
        draws: how many at each position, 1 to 65535.
    """

    draws: int = 50

    def __post_init__(self) -> None:
        check_range("samples", self.draws, at_least=1, at_most=65535)

    form: ClassVar[TeacherForm] = "sampled"

    def __call__(self, logits: Tensor, generator: torch.Generator) -> SparseSignal:
        """Draw tokens of each position from logits `[n, V]`, fp32, with `generator`, a CPU one."""
        log_p = logits.log_softmax(-1).cpu()
        drawn = log_p.exp().multinomial(self.draws, replacement=True, generator=generator).sort(-1).values
        is_first = torch.ones_like(drawn, dtype=torch.bool)
        is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        rank = is_first.cumsum(-1) - 1
        counts = torch.zeros(drawn.shape).scatter_add_(-1, rank, torch.ones(drawn.shape))
        ids = torch.zeros_like(drawn).scatter_(-1, rank, drawn)
        width = int(rank.max()) + 1
        ids, counts = ids[:, :width], counts[:, :width]
        log_probs = log_p.gather(-1, ids).masked_fill(counts == 0, -torch.inf)
        return SparseSignal(ids, log_probs, counts / self.draws)


Selection = TopK | Samples
