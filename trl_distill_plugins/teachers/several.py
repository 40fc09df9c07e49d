"""Several teachers at once: an ensemble that agrees on one distribution, or specialists of whom a column names one.

teacher_model_name_or_path: "ensemble:probabilities"      # or ensemble:logits
teacher_model_init_kwargs:
  teachers:
    - {teacher: big, weight: 2, prompt_template: "You are careful ...\\n{input}"}
    - other

teacher_model_name_or_path: "routed:task"                 # the column
teacher_model_init_kwargs:
  teachers:
    mathematics: {teacher: big-math, init_kwargs: {dtype: bfloat16}}
    code: big-code
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from trl_distill_plugins.errors import DataError, TeacherError, did_you_mean
from trl_distill_plugins.losses.joint import JointSignal, Mix, Part
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.prompts.panel import MEMBERS, PanelTemplates
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.teachers.base import Completion, Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.cache.documents import Document, documents_of, padded
from trl_distill_plugins.teachers.members import Member, parse_members
from trl_distill_plugins.teachers.self_teacher import SelfTeacher


class Panel(Teacher):
    """Teachers that are asked together. All have the student's tokenizer and give whole distributions."""

    members: list[Member]

    @classmethod
    def load_tokenizer(cls, address: Any, **init_kwargs: Any) -> Any:
        """Raise `TeacherError`: prompts are encoded for one teacher."""
        raise TeacherError(f"`trl-distill generate` asks one teacher; run it for each of those in {cls.name!r}")

    def __str__(self) -> str:
        """The name, and of whom it consists."""
        return f"{self.name} of {', '.join(str(member.teacher) for member in self.members)}"

    def check_student(self, tokenizer: Any) -> None:
        """Raise `TeacherError` unless all teachers have the student's tokenizer and give whole distributions."""
        for member in self.members:
            if isinstance(member.teacher, Panel | SelfTeacher):
                raise TeacherError(
                    f"{self.name!r} puts models in memory together, and {member.teacher} is none; give a path or hub "
                    "name, for the student as it was its own"
                )
            member.teacher.check_student(tokenizer)
            if member.teacher.form != "dense" or member.teacher.tokenizer is not None:
                raise TeacherError(
                    f"the teacher {member.teacher} gives no whole distributions over the student's tokens, which "
                    f"{self.name!r} puts together; use models in memory that have the student's tokenizer"
                )

    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """Put every teacher's model through `place`."""
        for member in self.members:
            member.teacher.prepare(place)

    def move_to(self, device: Any) -> None:
        """Move every teacher's model."""
        for member in self.members:
            member.teacher.move_to(device)

    def _read_own(self, inputs: dict[str, Any], trained: Tensor, members: Tensor) -> list[DenseSignal]:
        """What each teacher says of the documents that are its own."""
        mask = inputs.get("attention_mask")
        kept = torch.ones_like(members, dtype=torch.bool) if mask is None else mask.bool()
        signals = []
        for number, member in enumerate(self.members):
            own = {**inputs, "attention_mask": kept & (members == number)}
            documents = list(documents_of(own, trained & (members[:, 1:] == number)))
            signals.append(_signal_of(member.teacher, documents, trained.device))
        if sum(map(len, signals)) != int(trained.sum()):
            raise DataError(
                f"the rows were prepared for other teachers than the {self}; prepare them anew from their text"
            )
        return signals


class EnsembleTeacher(Panel):
    """A weighted mixture of teachers: of their probabilities, or of their logits. It writes no completions.

    Args:
        address: "probabilities" or "logits".
        teachers: a list of teachers, or of mappings with `teacher`, `weight`, `prompt_template` and `init_kwargs`.
    """

    name = "ensemble"

    def __init__(self, address: Mix, *, teachers: Sequence[Any] = (), **unknown: Any) -> None:
        if address not in get_args(Mix):
            hint = did_you_mean(address, get_args(Mix)) or "."
            raise TeacherError(f"an ensemble mixes probabilities or logits, not {address!r}{hint}")
        if not isinstance(teachers, list | tuple):
            raise TeacherError(f"the teachers of an ensemble are a list, not {teachers!r}")
        self.mix = address
        self.members = parse_members(self.name, list(enumerate(teachers, start=1)), unknown)
        total = sum(member.weight for member in self.members)
        self._weights = [member.weight / total for member in self.members]

    def prompts(self, template: PromptTemplate | None) -> PromptTemplate | PanelTemplates | None:
        """One prompt where all have the same, so that one view serves all."""
        templates = tuple(member.prompt(template) for member in self.members)
        return templates[0] if len(set(templates)) == 1 else PanelTemplates(templates)

    def signal(self, inputs: dict[str, Any], trained: Tensor) -> JointSignal:
        """Return the mixture at the trained positions."""
        inputs = dict(inputs)
        members = inputs.pop(MEMBERS, None)
        if members is None:
            signals = [_dense(member.teacher.signal(inputs, trained)) for member in self.members]
        else:
            signals = self._read_own(inputs, trained, members)
        parts = [Part(signal, weight) for signal, weight in zip(signals, self._weights, strict=True)]
        return JointSignal(parts, len(signals[0]), self.mix)

    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Raise `TeacherError`."""
        raise TeacherError(
            "an ensemble judges completions and writes none; have one teacher write them first (`trl-distill "
            "generate`), or give the rows their completions"
        )


class RoutedTeacher(Panel):
    """Specialists: a column of the dataset names the one who reads, and completes, a row.

    Args:
        address: the column.
        teachers: its values, each with a teacher, or with a mapping of `teacher`, `prompt_template` and `init_kwargs`.
    """

    name = "routed"

    def __init__(self, address: str, *, teachers: Mapping[str, Any] | None = None, **unknown: Any) -> None:
        if not address:
            raise TeacherError("a routed teacher needs the column that names the teacher of a row: routed:COLUMN")
        if teachers is not None and not isinstance(teachers, Mapping):
            raise TeacherError("the teachers of a routed teacher are a mapping from the column's values to teachers")
        self._column = address
        self.members = parse_members(self.name, list((teachers or {}).items()), unknown, weighted=False)

    def prompts(self, template: PromptTemplate | None) -> PanelTemplates:
        """The prompt of each teacher, and the column."""
        templates = tuple(member.prompt(template) for member in self.members)
        return PanelTemplates(templates, tuple(member.name for member in self.members), self._column)

    def signal(self, inputs: dict[str, Any], trained: Tensor) -> JointSignal:
        """Return what the teacher of each document says at its trained positions."""
        inputs = dict(inputs)
        members = inputs.pop(MEMBERS)
        signals = self._read_own(inputs, trained, members)
        owners = members[:, 1:][trained]
        parts = [Part(signal, rows=(owners == i).nonzero().flatten()) for i, signal in enumerate(signals)]
        return JointSignal(parts, len(owners))

    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Have each prompt completed by its own teacher."""
        for number, member in enumerate(self.members):
            indices = [index for index, prompt in enumerate(prompts) if prompt.member == number]
            own = [prompts[index] for index in indices]
            for position, completion in member.teacher.generate(own, generation, batch_size) if own else ():
                yield indices[position], completion


def _signal_of(teacher: Teacher, documents: list[Document], device: torch.device) -> DenseSignal:
    """What `teacher` says of `documents`. One that has none in this batch reads two tokens for nothing: other processes
    may wait for its shards."""
    nothing = Document(b"", torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.bool))
    return _dense(teacher.signal(*padded(documents or [nothing], device)))


def _dense(signal: Any) -> DenseSignal:
    if not isinstance(signal, DenseSignal):
        raise TeacherError("teachers that are put together must each be one model that gives whole distributions")
    return signal
