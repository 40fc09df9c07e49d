"""What a teacher is: something that gives a signal at the trained positions and, if it can, writes completions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.losses.joint import TeacherSignal
from trl_distill_plugins.losses.layers import LayerRequest, ModelShape
from trl_distill_plugins.losses.tiles import TeacherForm
from trl_distill_plugins.prompts.panel import PanelTemplates
from trl_distill_plugins.prompts.rows import Prompt
from trl_distill_plugins.prompts.templates import PromptTemplate


@dataclass(frozen=True)
class Generation:
    """How a teacher writes completions.

    Args:
        max_new_tokens: a completion is cut off there.
        temperature: 0 takes the most likely token each time; above 0 samples.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True)
class TeacherPrompt:
    """A prompt to continue, in two forms; a teacher takes the one it works with.

    Args:
        source: text or chat messages, `teacher_prompt_template` filled in.
        token_ids: the same in ids, `[T]`: of `Teacher.tokenizer`, of the student's where that is None or, where there
            is no student, of `Teacher.load_tokenizer`; empty for a teacher that has none.
        member: which of several teachers is asked, see `Teacher.prompts`.
    """

    source: Prompt
    token_ids: list[int]
    member: int = 0


@dataclass(frozen=True)
class Completion:
    """What a teacher wrote after one prompt. `finished` is False where `max_new_tokens` cut it off."""

    text: str
    finished: bool


class Teacher(ABC):
    """Subclass it, name it, and return the class from `register_teachers`.

    `teacher_model_name_or_path: "name:address"` makes `MyTeacher("address", ...)`; a path without a registered name in
    front is a model for `LocalTeacher`.

    Class attributes:
        name: the scheme in front of the colon.
        form: "dense" for signals of whole distributions, "top_k" or "sampled" for sparse ones, "text" for a teacher
            that gives none and only writes.
    """

    name: ClassVar[str]
    form: TeacherForm = "dense"

    @abstractmethod
    def __init__(self, address: Any, **init_kwargs: Any) -> None:
        """Take the address and `teacher_model_init_kwargs`."""

    @classmethod
    def load_tokenizer(cls, address: Any, **init_kwargs: Any) -> Any:
        """The tokenizer that prompts for the teacher at `address` are encoded with where there is no student; None for
        a teacher that takes their text. Loads no model. A tokenizer that cannot be loaded is a `TeacherError`."""
        return None

    @classmethod  # noqa: B027 - most can tell no sooner
    def check_address(cls, address: Any, **init_kwargs: Any) -> None:
        """Raise `DistillError` for what no such teacher can be made of. Loads nothing, asks nobody, writes nothing."""

    def __str__(self) -> str:
        """How messages name this teacher."""
        return repr(self.name)

    @abstractmethod
    def check_student(self, tokenizer: Any) -> None:
        """Raise `TeacherError` unless the teacher's signal is about the tokens of the student's `tokenizer`, or of
        `self.tokenizer`, which is known then. Called before `signal` and `generate`, which are given such ids."""

    @property
    def tokenizer(self) -> Any:
        """The teacher's own tokenizer, if it is another than the student's; else None. Its `signal` is then dense, and
        its view of a batch in ids of that tokenizer."""
        return None

    def check_prompt(self, template: Any) -> None:  # noqa: B027 - most teachers have nothing to check
        """Raise `TeacherError` if the teacher cannot answer prompts of `teacher_prompt_template` as the config has it;
        one that is asked now can."""

    def prompts(self, template: PromptTemplate | None) -> PromptTemplate | PanelTemplates | None:
        """How this teacher is prompted, given `teacher_prompt_template`: several teachers in one, each as it likes."""
        return template

    def join(self, student: nn.Module, forward: Callable[..., Any], *, is_sharded: bool) -> None:  # noqa: B027
        """Meet the student, once, before anything else is asked; for a teacher that is made of it.

        Args:
            student: the model that trains, in its adapter (PEFT) but in no wrapper (DDP, FSDP, DeepSpeed).
            forward: `forward(function, *args)` calls `function` as a forward of the student, where its weights are
                whole and under the run's autocast. Only once training or an evaluation has begun.
            is_sharded: whether the weights are split over the processes everywhere else.
        """

    @abstractmethod
    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """Put every model the teacher holds through `place`, which shards it or moves it to its device."""

    @abstractmethod
    def move_to(self, device: Any) -> None:
        """Get ready to `generate` on `device`, before `prepare`; a teacher elsewhere has nothing to do."""

    @abstractmethod
    def signal(self, inputs: dict[str, Any], trained: Tensor) -> TeacherSignal:
        """Return what the teacher says at the trained positions.

        Args:
            inputs: what a model's forward takes, `[B, T]`: the teacher's view of the batch.
            trained: `[B, T - 1]`, True where the next token is trained. The signal's rows follow its order.
        """

    @abstractmethod
    def generate(
        self, prompts: Sequence[TeacherPrompt], generation: Generation, batch_size: int
    ) -> Iterator[tuple[int, Completion]]:
        """Continue the prompts, `batch_size` at a time; yield the index of each with what was written as soon as it is
        there, in any order. What was yielded is kept, whatever happens next."""

    def revision(self) -> str:
        """What tells this teacher's word from another's in a cache of it. One that cannot be cached raises
        `TeacherError`."""
        raise TeacherError(
            f"the teacher {self} cannot be cached; a cache is built from a teacher in memory or on a server, set "
            "teacher_model_name_or_path to one"
        )

    def shape(self) -> ModelShape:
        """The shape of the teacher's model. One that cannot `show_layers` raises `TeacherError`."""
        raise TeacherError(_no_layers(self))

    def show_layers(self, request: LayerRequest) -> None:
        """Put these layers into each signal from now on. A teacher that cannot raises `TeacherError`."""
        raise TeacherError(_no_layers(self))

    def after_step(self) -> None:  # noqa: B027 - for a teacher that moves
        """Called after each optimizer step, on every process, where the losses need the teacher."""

    def save(self, folder: Path) -> None:  # noqa: B027 - for a teacher with a state
        """Write the teacher's state, if it has one, to a checkpoint. One process calls it."""

    def load(self, folder: Path) -> None:  # noqa: B027 - for a teacher with a state
        """Take over what `save` wrote. Every process calls it, before training resumes."""


def _no_layers(teacher: Teacher) -> str:
    return (
        f"the teacher {teacher.name!r} gives no hidden states or attention maps, which hidden losses compare; use a "
        "model in memory (teacher_model_name_or_path: a path or hub name), or losses on logits"
    )
