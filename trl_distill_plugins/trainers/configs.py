"""Training arguments: TRL's, plus what distillation adds."""

import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import SFTConfig

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import BaseLoss
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.losses.chunked import DEFAULT_CHUNK_SIZE
from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.trainers.trl_compat import GKDConfig


@dataclass
class DistillationArguments:
    """What distillation adds to a TRL config.

    Args:
        losses: the objective, e.g. `[{"name": "forward_kl", "weight": 0.7, "temperature": 3.0}, "cross_entropy"]`; a
            JSON string on the command line. A weight or numeric option may be a schedule, e.g. `{"schedule": "linear",
            "start": 1.0, "end": 0.1}`. `trl-distill plugins` lists the names and options, docs/losses.md explains them.
        distill_alpha: short form of `losses`: `alpha * T^2 * forward_kl + (1 - alpha) * cross_entropy`, 0 to 1.
        distill_temperature: T of the short form, above 0.
        teacher_prompt_template: what the teacher sees: text with `{input}` and other `{columns}`, or a list of chat
            messages (JSON on the command line). Without one it sees the row's own prompt.
        student_prompt_template: what the student sees, likewise.
        input_column: the column that fills `{input}`, where it is neither `input` nor the row's prompt.
        max_teacher_length: tokens of prompt and completion the teacher is given; None for no limit.
        loss_chunk_size: tokens per tile of the loss; the peak holds about two tiles of this many rows of logits.
    """

    losses: list[Any] | str | None = field(
        default=None, metadata={"help": 'Objective: a list of {"name", "weight", options}; JSON on the command line.'}
    )
    distill_alpha: float | None = field(
        default=None, metadata={"help": "Short form of losses: alpha T^2 forward_kl + (1 - alpha) cross_entropy."}
    )
    distill_temperature: float | None = field(
        default=None, metadata={"help": "Temperature T of the short form. Default 1."}
    )
    teacher_prompt_template: list[Any] | str | None = field(
        default=None, metadata={"help": "What the teacher sees: text with {input} and {columns}, or chat messages."}
    )
    student_prompt_template: list[Any] | str | None = field(
        default=None, metadata={"help": "What the student sees: text with {input} and {columns}, or chat messages."}
    )
    input_column: str | None = field(
        default=None, metadata={"help": "Column that fills {input}, where it is not `input` or the prompt."}
    )
    max_teacher_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt and completion the teacher is given. Default: no limit."}
    )
    loss_chunk_size: int = field(default=DEFAULT_CHUNK_SIZE, metadata={"help": "Tokens per tile of the loss."})

    def __post_init__(self) -> None:
        self._fall_back_to_fp32()
        super().__post_init__()  # type: ignore[misc]
        self.losses = _from_json("losses", self.losses)
        if self.losses is not None and (self.distill_alpha is not None or self.distill_temperature is not None):
            raise ConfigError("losses and distill_alpha/distill_temperature say the same thing; give one of them")
        if self.distill_alpha is not None:
            check_range("distill_alpha", self.distill_alpha, at_least=0.0, at_most=1.0)
        if self.distill_temperature is not None:
            check_range("distill_temperature", self.distill_temperature, above=0.0)
        check_range("loss_chunk_size", self.loss_chunk_size, at_least=1)
        self.template("teacher")
        self.template("student")
        self.objective()

    def to_dict(self) -> dict[str, Any]:
        """The arguments as JSON can write them: a loss made in Python by its name and options."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if isinstance(self.losses, list):
            values["losses"] = [each.config if isinstance(each, BaseLoss) else each for each in self.losses]
        return values

    def _fall_back_to_fp32(self: Any) -> None:
        """TRL's default is bf16, and it refuses to start on a machine without: train in fp32 there."""
        has_bf16 = self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
        if self.bf16 is None and not self.fp16 and not has_bf16:
            self.bf16 = False

    def template(self, side: Literal["teacher", "student"]) -> PromptTemplate | None:
        """The parsed prompt template of one side, or None where it sees the row's own prompt."""
        option = f"{side}_prompt_template"
        value = getattr(self, option)
        return None if value is None else PromptTemplate.parse(value, option)

    def objective(self) -> Objective | None:
        """The objective these arguments spell out, or None where they leave it to the trainer."""
        if self.losses is not None:
            return Objective.from_config(self.losses)
        if self.distill_alpha is None and self.distill_temperature is None:
            return None
        alpha = 1.0 if self.distill_alpha is None else self.distill_alpha
        divergence = {"name": "forward_kl", "weight": alpha, "temperature": self.distill_temperature or 1.0}
        return Objective.from_config([divergence, {"name": "cross_entropy", "weight": 1.0 - alpha}])


def _from_json(name: str, value: Any) -> Any:
    """Parse a value that came as a JSON string from the command line."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not valid JSON ({error.msg} at character {error.pos + 1}): {value!r}") from None
    if not isinstance(parsed, list):
        raise ConfigError(f"{name} must be a JSON list, got {value!r}")
    return parsed


@dataclass
class DistillSFTConfig(DistillationArguments, SFTConfig):
    """`trl.SFTConfig` plus distillation. See `DistillationArguments` for what both trainers add.

    Args:
        teacher_model_name_or_path: a path or hub name, or `scheme:address` of a teacher plugin.
        teacher_model_init_kwargs: for loading it: dtype, revision, quantization, device_map, ...
        max_new_tokens: where the teacher's completions are cut off, for rows that come without one.
        generation_temperature: 0 lets the teacher take its most likely token each time, above 0 it samples.
        generation_batch_size: prompts the teacher completes at a time.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: a path, a hub name, or scheme:address of a teacher plugin."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading the teacher: dtype, revision, ..."}
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Where the teacher's completions are cut off, for rows without one."}
    )
    generation_temperature: float = field(
        default=0.0, metadata={"help": "0: the teacher takes its most likely token each time; above 0: it samples."}
    )
    generation_batch_size: int = field(default=16, metadata={"help": "Prompts the teacher completes at a time."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("generation_temperature", self.generation_temperature, at_least=0.0)
        check_range("max_new_tokens", self.max_new_tokens, at_least=1)
        check_range("generation_batch_size", self.generation_batch_size, at_least=1)


@dataclass
class DistillGKDConfig(DistillationArguments, GKDConfig):
    """`trl.experimental.gkd.GKDConfig` plus distillation. See `DistillationArguments` for what both trainers add.

    `temperature` and `max_new_tokens` are GKD's: how completions are sampled during training. The temperature of a
    loss is an option of that loss. Without `losses`, the objective is `jsd` with GKD's `beta`.
    """
