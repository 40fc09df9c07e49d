"""A teacher with another vocabulary than the student's: the classes of tokens both have, and the tile a loss sees then.

A class is a set of tokens of the one and a set of tokens of the other that mean the same. M classes and, as one more,
all other tokens are two distributions over M + 1 classes, p's and q's, as with a sparse teacher (see `sparse.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.sparse import NO_MASS
from trl_distill_plugins.losses.tiles import LogitsTile, Tail, TeacherTile, teacher_of

if TYPE_CHECKING:
    from trl_distill_plugins.losses.base import Loss


@dataclass(frozen=True)
class TokenClasses:
    """The M classes in tokens of one vocabulary; the order of the classes is the same for both.

    Args:
        single: the token of each of the first S classes, `[S]`, int64.
        groups: the tokens of each of the other M - S, `[M - S, w]`; -1 where one has fewer than w.
        width: tokens a vocabulary must have for all of them to be in it.
    """

    single: Tensor
    groups: Tensor
    width: int

    @classmethod
    def of(cls, singles: Sequence[int], groups: Sequence[Sequence[int]]) -> Self:
        """Make them of ids."""
        longest = max(map(len, groups), default=1)
        padded = [[*group, *[-1] * (longest - len(group))] for group in groups]
        single = torch.tensor(singles, dtype=torch.long)
        members = torch.tensor(padded, dtype=torch.long).reshape(len(groups), longest)
        return cls(single, members, 1 + max([*singles, *(token for group in groups for token in group)], default=-1))

    def on(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, single=self.single.to(device), groups=self.groups.to(device))

    @property
    def tokens(self) -> Tensor:
        """All tokens that are in a class."""
        return torch.cat([self.single, self.groups[self.groups >= 0]])

    def merge(self, logits: Tensor) -> Tensor:
        """The logits of the classes, `[n, M]`, from those of the vocabulary, `[n, V]`."""
        single = logits.index_select(1, self.single)
        return torch.cat([single, self._members(logits).logsumexp(-1)], -1) if len(self.groups) else single

    def spread(self, gradient: Tensor, logits: Tensor, out: Tensor) -> Tensor:
        """Write the gradient by the `logits` of these tokens, from the one by the classes', `[n, M]`, into `out`
        `[n, V]`, which is 0 there."""
        out.index_copy_(1, self.single, gradient[:, : len(self.single)])
        if len(self.groups):
            parts = self._members(logits).softmax(-1) * gradient[:, len(self.single) :, None]
            out.index_add_(1, self.groups.clamp_min(0).flatten(), parts.flatten(1))
        return out

    def _members(self, logits: Tensor) -> Tensor:
        """The logits of the groups' tokens, `[n, M - S, w]`."""
        return logits[:, self.groups.clamp_min(0)].masked_fill(self.groups < 0, -torch.inf)


@dataclass(frozen=True)
class SharedVocabulary:
    """The classes of two vocabularies, in tokens of each."""

    student: TokenClasses
    teacher: TokenClasses

    @classmethod
    def of(cls, classes: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Self:
        """Make it of the ids that each class has for the student and for the teacher."""
        given = list(classes)
        single = [pair for pair in given if max(map(len, pair)) == 1]
        groups = [pair for pair in given if max(map(len, pair)) > 1]
        own, theirs = (
            TokenClasses.of([pair[side][0] for pair in single], [pair[side] for pair in groups]) for side in (0, 1)
        )
        return cls(own, theirs)

    def on(self, device: torch.device) -> "SharedVocabulary":
        """The same on another device; itself where it is there already."""
        if device == self.student.single.device:
            return self
        return SharedVocabulary(self.student.on(device), self.teacher.on(device))


@dataclass
class SharedTile:
    """A tile over shared classes, and the way back to the student's vocabulary.

    Args:
        tile: what the loss sees, `[n, M + 1]`, or `[n, M]` without a class of all others.
        logits: the student's at the loss's temperature, `[n, V]`.
        others: the same, -inf for tokens that are in a class.
        rest: their logsumexp, `[n, 1]`; None without a class of all others.
        classes: the student's tokens of each class.
    """

    tile: LogitsTile
    logits: Tensor
    others: Tensor
    rest: Tensor | None
    classes: TokenClasses

    def spread(self, gradient: Tensor) -> Tensor:
        """Turn the gradient by the classes' logits into the one by the student's, `[n, V]`."""
        if self.rest is None:
            return self.classes.spread(gradient, self.logits, torch.zeros_like(self.logits))
        others = (self.others - self.rest).exp_().mul_(gradient[:, -1:])
        return self.classes.spread(gradient[:, :-1], self.logits, others)

    def agrees(self, top_q: Tensor, p: Tensor) -> Tensor:
        """Whether the most likely class of `p` `[n, M + 1]`, all others left out, has the token `top_q`, `[n]`."""
        classes = self.classes
        single = torch.nn.functional.pad(classes.single[:, None], (0, classes.groups.shape[1] - 1), value=-1)
        tokens = torch.cat([single, classes.groups])
        return (tokens[p[:, : len(tokens)].argmax(-1)] == top_q[:, None]).any(-1)


def shared_tile(
    tile: LogitsTile, vocabulary: SharedVocabulary, temperature: float = 1.0, tail: Tail = "bucket"
) -> SharedTile:
    """The tile over the classes of `vocabulary` at `temperature`, differentiable in `tile.student`; without a class of
    all other tokens if `tail` is "renormalise". `tile.teacher` has the logits of the teacher's own vocabulary."""
    hot = tile.at_temperature(temperature)
    student, teacher = hot.student, teacher_of(hot).logits
    classes, theirs = vocabulary.student.merge(student), vocabulary.teacher.merge(teacher)
    others, rest = _others(student, vocabulary.student), None
    if tail == "bucket":
        rest = _rest(others)
        classes = torch.cat([classes, rest], -1)
        theirs = torch.cat([theirs, _rest(_others(teacher, vocabulary.teacher))], -1)
    return SharedTile(
        replace(tile, student=classes, teacher=TeacherTile(theirs)), student, others, rest, vocabulary.student
    )


def _others(logits: Tensor, classes: TokenClasses) -> Tensor:
    return logits.index_fill(1, classes.tokens, -torch.inf)


def _rest(others: Tensor) -> Tensor:
    return others.logsumexp(-1, keepdim=True).clamp_min(NO_MASS)  # every token may be in a class


def copes(loss: "Loss") -> bool:
    """Whether `loss` works with a teacher that has another vocabulary."""
    return not loss.needs_teacher or loss.any_vocabulary or "top_k" in loss.teacher_forms


def check_shared(vocabulary: SharedVocabulary, losses: "Iterable[Loss]", student: int, teacher: int) -> None:
    """Raise `ConfigError` unless `losses` cope with two vocabularies, of `student` and `teacher` tokens, and all
    shared classes are in them."""
    for loss in losses:
        if not copes(loss):
            raise ConfigError(f"loss {loss.name!r} compares token by token, and the teacher has another vocabulary")
    for side, classes, width in (("student", vocabulary.student, student), ("teacher", vocabulary.teacher, teacher)):
        if classes.width > width:
            raise ConfigError(
                f"the {side}'s tokenizer has {classes.width} tokens and its model only {width}; resize the model's "
                "embeddings"
            )
