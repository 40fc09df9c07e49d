"""A teacher that names a few tokens of each position, and the tile a loss sees then.

The named tokens and, as one more class, all others are two distributions over k + 1 classes, p's and q's. A loss of two
distributions takes them as it takes V classes. The student's logit of "all others" is the logsumexp of their logits,
so that the softmax over the classes is the one over the vocabulary, summed.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.tiles import LogitsTile, SampledTeacherTile, Tail, TeacherForm, TeacherTile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trl_distill_plugins.losses.base import Loss

# By how much a sum of rounded probabilities may pass 1.
_SUM_SLACK = 0.05
# Stands for a logit of -inf: finite, so that 0 times it is 0.
NO_MASS = -1e30


@dataclass(frozen=True)
class SparseSignal:
    """What a teacher says of N trained positions by naming tokens of its vocabulary.

    Args:
        ids: `[N, k]`, int64; the named tokens of a position are all different.
        log_probs: `[N, k]`, the teacher's log p of them at T = 1, over its whole vocabulary, in nats; -inf where a
            position names fewer than k.
        weights: `[N, k]` for tokens that were drawn from the teacher (random sampling KD, 2503.16870): the share of
            the draws each got, in which case `log_probs` may be `weights.log()` if the teacher's own are not known.
            None for the k most likely tokens.
    """

    ids: Tensor
    log_probs: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> "SparseSignal":
        return SparseSignal(self.ids[rows], self.log_probs[rows], None if self.weights is None else self.weights[rows])

    def finite_rows(self) -> Tensor:
        """Whether what was said of a position is a number, `[N]`."""
        return ~self.log_probs.isnan().any(-1)

    @property
    def named(self) -> Tensor:
        """Whether a column names a token, `[N, k]`."""
        return self.log_probs > -torch.inf

    @property
    def form(self) -> TeacherForm:
        """How losses call such a teacher."""
        return "top_k" if self.weights is None else "sampled"

    def on(self, device: torch.device) -> "SparseSignal":
        """The same signal on another device; itself where it is there already."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, ids=self.ids.to(device), log_probs=self.log_probs.to(device), weights=weights)


def check_form(form: TeacherForm, losses: "Iterable[Loss]") -> None:
    """Raise `ConfigError` if one of `losses` cannot work with such a teacher."""
    for loss in losses:
        if not loss.needs_teacher:
            continue
        if form == "text":
            raise ConfigError(
                f"loss {loss.name!r} compares probabilities, and this teacher gives text only, no probabilities; train "
                "on its completions, losses: [cross_entropy], or take a teacher in memory or on a server with log-probs"
            )
        if form not in loss.teacher_forms:
            kinds = " or ".join(loss.teacher_forms)
            raise ConfigError(
                f"loss {loss.name!r} needs a {kinds} teacher, and this one is {form}: it names only some tokens of "
                "each position; take a teacher in memory, or a loss such as forward_kl"
            )
        if form == "sampled" and loss.temperature != 1.0:
            raise ConfigError(
                f"loss {loss.name!r} has temperature {loss.temperature:g}, and this teacher's tokens were sampled at "
                "1; set temperature: 1"
            )
        if form == "sampled" and loss.tail != "bucket":
            raise ConfigError(
                f"loss {loss.name!r} has tail {loss.tail!r}, and this teacher's tokens were sampled: among "
                "themselves they are no estimate of p; set tail: bucket"
            )


def check_signal(signal: SparseSignal, losses: "Iterable[Loss]", width: int) -> None:
    """Raise `ConfigError` unless `signal` names tokens of a vocabulary of `width`, in a form all `losses` take."""
    check_form(signal.form, losses)
    n, k = signal.ids.shape
    if k > width:
        raise ConfigError(f"the teacher names {k} tokens a position, and the student's vocabulary has {width}")
    if signal.log_probs.shape != (n, k) or (signal.weights is not None and signal.weights.shape != (n, k)):
        raise ConfigError(f"the teacher's ids are {[n, k]}, its log_probs {list(signal.log_probs.shape)}")
    if k and bool((signal.log_probs.logsumexp(-1) > _SUM_SLACK).any()):
        raise ConfigError("the teacher's log_probs sum to more than 1; give log-probabilities over the vocabulary")
    named = signal.ids[signal.named]
    if len(named) and not (named.min() >= 0 and named.max() < width):
        raise ConfigError(
            f"the teacher names tokens {named.min().item()} to {named.max().item()}, and the student's vocabulary has "
            f"{width}: they do not share a tokenizer"
        )


@dataclass
class MergedTile:
    """A tile over the classes of a sparse teacher, and the way back to the vocabulary.

    Args:
        tile: what the loss sees, `[n, k + 1]`, or `[n, k]` without a class of all others.
        unnamed: the student's logits at the loss's temperature, -inf where the teacher named the token, `[n, V]`.
        rest: their logsumexp, `[n, 1]`; None without a class of all others.
        ids: the class of a column is this token, `[n, k]`.
    """

    tile: LogitsTile
    unnamed: Tensor
    rest: Tensor | None
    ids: Tensor

    def spread(self, gradient: Tensor) -> Tensor:
        """Turn the gradient by the classes' logits into the one by the student's, `[n, V]`."""
        named = gradient[:, : self.ids.shape[1]]
        if self.rest is None:
            return torch.zeros_like(self.unnamed).scatter_add_(1, self.ids, named)
        spread = (self.unnamed - self.rest).exp_().mul_(gradient[:, -1:])
        return spread.scatter_add_(1, self.ids, named)

    def agrees(self, top_q: Tensor, p: Tensor) -> Tensor:
        """Whether the most likely of the named tokens, by `p` over the classes, is the token `top_q`, `[n]`."""
        return top_q == likeliest_named(self.ids, p)


def likeliest_named(ids: Tensor, p: Tensor) -> Tensor:
    """The most likely of the named tokens `ids` `[n, k]` by `p` over the classes, `[n]`; -1 where none has any mass."""
    likeliest, column = p[:, : ids.shape[1]].max(-1)
    return ids.gather(1, column.unsqueeze(-1)).squeeze(-1).masked_fill(likeliest == 0, -1)


def merged_tile(tile: LogitsTile, signal: SparseSignal, temperature: float = 1.0, tail: Tail = "bucket") -> MergedTile:
    """The tile over the classes of `signal` at `temperature`, differentiable in `tile.student`; without a class of all
    other tokens if `tail` is "renormalise", or if there are none."""
    student = tile.student if temperature == 1.0 else tile.student / temperature
    width, named = student.shape[-1], signal.named
    a_named = signal.ids.gather(1, named.int().argmax(-1, keepdim=True)).clamp(0, width - 1)
    ids = torch.where(named, signal.ids, a_named)  # a column too many repeats a token, and has no mass
    unnamed, logits, rest = student.scatter(1, ids, -torch.inf), student.gather(1, ids), None
    if has_rest(signal, width, tail):
        rest = unnamed.logsumexp(-1, keepdim=True).clamp_min(NO_MASS)  # a position may name every token
    view = class_tile(tile, signal, width, temperature, logits, rest)
    return MergedTile(view, unnamed, rest, ids)


def has_rest(signal: SparseSignal, width: int, tail: Tail) -> bool:
    """Whether there is a class of all other tokens of a vocabulary of `width`."""
    return tail == "bucket" and not (signal.ids.shape[1] == width and bool(signal.named.all()))


def class_tile(
    tile: LogitsTile, signal: SparseSignal, width: int, temperature: float, named: Tensor, rest: Tensor | None
) -> LogitsTile:
    """`tile` over the classes of `signal`, which names tokens of a vocabulary of `width`. `named` `[n, k]` are the
    student's logits of those tokens at `temperature`, `rest` `[n, 1]` the logsumexp of all others, None without that
    class; the tile's own logits are not looked at."""
    log_probs = signal.log_probs.to(named.dtype)
    classes, teacher = named.masked_fill(~signal.named, NO_MASS), log_probs / temperature
    if rest is not None:
        outside = width - signal.named.sum(-1, keepdim=True)
        classes = torch.cat([classes, rest], -1)
        teacher = torch.cat([teacher, _tail(log_probs, outside, temperature)], -1)
    view = TeacherTile(teacher)
    if signal.weights is not None:
        drawn = torch.nn.functional.pad(signal.weights.to(named.dtype), (0, classes.shape[1] - named.shape[1]))
        view = SampledTeacherTile(teacher, drawn)
    return replace(tile, student=classes, teacher=view)


def _tail(log_probs: Tensor, outside: Tensor, temperature: float) -> Tensor:
    """Log of the teacher's mass outside its named tokens, `[n, 1]`, taken as even over the `outside` tokens there.

    Of m tokens of mass tail / m each, `m (tail / m)^(1/T)` remains at temperature T, before normalisation.
    """
    inside = log_probs.double().logsumexp(-1, keepdim=True).clamp_max(-torch.finfo(torch.float32).tiny)
    tail = torch.log(-torch.expm1(inside))  # in fp64: little may be left of 1
    return (tail / temperature + (1 - 1 / temperature) * outside.clamp_min(1).double().log()).to(log_probs.dtype)
