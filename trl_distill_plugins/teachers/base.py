"""What a teacher is: something that gives a signal at the trained positions and, if it can, writes completions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.losses.layers import LayerRequest, ModelShape
from trl_distill_plugins.losses.signals import DenseSignal
from trl_distill_plugins.losses.sparse import SparseSignal
from trl_distill_plugins.losses.tiles import TeacherForm
from trl_distill_plugins.prompts.rows import Prompt


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
        token_ids: the same in ids of the student's tokenizer, `[T]`.
    """

    source: Prompt
    token_ids: list[int]


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

    def __str__(self) -> str:
        """How messages name this teacher."""
        return repr(self.name)

    @abstractmethod
    def check_student(self, tokenizer: Any) -> None:
        """Raise `TeacherError` unless the teacher's signal is about the tokens of the student's `tokenizer`. Called
        before `signal` and `generate`, which are given ids of this tokenizer."""

    def check_prompt(self, template: Any) -> None:  # noqa: B027 - most teachers have nothing to check
        """Raise `TeacherError` if the teacher cannot answer prompts of `teacher_prompt_template` as the config has it;
        one that is asked now can."""

    @abstractmethod
    def prepare(self, place: Callable[[nn.Module], nn.Module]) -> None:
        """Put every model the teacher holds through `place`, which shards it or moves it to its device."""

    @abstractmethod
    def move_to(self, device: Any) -> None:
        """Get ready to `generate` on `device`, before `prepare`; a teacher elsewhere has nothing to do."""

    @abstractmethod
    def signal(self, inputs: dict[str, Any], trained: Tensor) -> DenseSignal | SparseSignal:
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


def _no_layers(teacher: Teacher) -> str:
    return (
        f"the teacher {teacher.name!r} gives no hidden states or attention maps, which hidden losses compare; use a "
        "model in memory (teacher_model_name_or_path: a path or hub name), or losses on logits"
    )
