"""The options of `trl-distill generate`, from flags and a config of its own or of a training run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_distill_plugins.cli.train_worker import check_known, option_names, parse_options, training_options
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.teachers.base import Generation

COMMAND = "trl-distill generate"
PRICES = ("price_per_million_prompt_tokens", "price_per_million_completion_tokens")


@dataclass
class GenerateArguments:
    """Which teacher completes what, how, and where to. Options that training has too mean the same there.

    Args:
        output_file: a .jsonl file; the same command resumes what is in it.
        dataset_name: a .jsonl, .json, .csv or .parquet file, or a dataset path or hub name.
        dataset_config: the configuration of a dataset of the hub.
        dataset_train_split: its split.
        input_column: the column that fills `{input}`, where it is neither `input` nor the row's prompt.
        teacher_model_name_or_path: a path or hub name, or `scheme:address` of a teacher plugin.
        teacher_model_init_kwargs: for loading it: dtype, revision, quantization, device_map, ...
        trust_remote_code: whether code that comes with the teacher may run.
        teacher_prompt_template: what the teacher sees. Without one it sees the row's own prompt.
        max_new_tokens: a completion is cut off there.
        generation_temperature: 0 takes the most likely token each time; above 0 samples.
        generation_batch_size: prompts the teacher completes at a time.
        num_generations: completions of each prompt; more than one need a temperature above 0.
        category_column: a column whose values are counted.
        rows_per_category: prompts drawn of each of its values, at most.
        max_rows: rows of the dataset that are looked at, from its beginning.
        seed: for drawing rows and for sampling.
        use_cpu: stay on the CPU.
        dry_run: ask nothing; print rows, tokens and cost.
        json: print the dry run as one JSON object.
        price_per_million_prompt_tokens: for the dry run, in any currency.
        price_per_million_completion_tokens: likewise.
    """

    output_file: str | None = field(default=None, metadata={"help": "Where to: a .jsonl file; resumed if it exists."})
    dataset_name: str | None = field(default=None, metadata={"help": "Rows: a file, or a dataset path or hub name."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a dataset of the hub."})
    input_column: str | None = field(
        default=None, metadata={"help": "Column that fills {input}, where it is not `input` or the prompt."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: a path, a hub name, or scheme:address of a teacher plugin."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading the teacher: dtype, revision, ...; JSON."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let code that comes with the teacher run."})
    teacher_prompt_template: list[Any] | str | None = field(
        default=None, metadata={"help": "What the teacher sees: text with {input} and {columns}, or chat messages."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Where completions are cut off."})
    generation_temperature: float = field(
        default=0.0, metadata={"help": "0: the teacher takes its most likely token each time; above 0: it samples."}
    )
    generation_batch_size: int = field(default=16, metadata={"help": "Prompts the teacher completes at a time."})
    num_generations: int = field(default=1, metadata={"help": "Completions of each prompt."})
    category_column: str | None = field(default=None, metadata={"help": "Column whose values are counted."})
    rows_per_category: int | None = field(
        default=None, metadata={"help": "Prompts drawn of each value of category_column, at most."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Look at no more than the first so many rows."})
    seed: int = field(default=42, metadata={"help": "For drawing rows and for sampling."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    dry_run: bool = field(default=False, metadata={"help": "Ask nothing; print rows, tokens and cost."})
    json: bool = field(default=False, metadata={"help": "Print the dry run as one JSON object."})
    price_per_million_prompt_tokens: float | None = field(default=None, metadata={"help": "For the dry run."})
    price_per_million_completion_tokens: float | None = field(default=None, metadata={"help": "For the dry run."})

    def __post_init__(self) -> None:
        for option in ("max_new_tokens", "generation_batch_size", "num_generations", "rows_per_category", "max_rows"):
            if getattr(self, option) is not None:
                check_range(option, getattr(self, option), at_least=1)
        for option in ("generation_temperature", *PRICES):
            if getattr(self, option) is not None:
                check_range(option, getattr(self, option), at_least=0.0)
        unpriced = [option for option in PRICES if getattr(self, option) is None]
        if len(unpriced) == 1:
            raise ConfigError(f"{unpriced[0]} is missing beside the other price; give both, 0 for what is free")
        if self.num_generations > 1 and self.generation_temperature == 0:
            raise ConfigError(
                f"num_generations is {self.num_generations} at generation_temperature 0, where all completions of a "
                "prompt are the same; set a temperature above 0"
            )
        if self.rows_per_category is not None and self.category_column is None:
            raise ConfigError("rows_per_category needs category_column: name the column that holds the category")
        if self.json and not self.dry_run:
            raise ConfigError("json prints what a dry run found; add dry_run")
        self.teacher_model_init_kwargs = _mapping("teacher_model_init_kwargs", self.teacher_model_init_kwargs)
        self.template()

    def check_complete(self) -> None:
        """Raise `ConfigError` unless it is said which teacher completes what, and where to."""
        if not self.teacher_model_name_or_path:
            raise ConfigError("teacher_model_name_or_path is missing: name the teacher, by path, hub name or scheme")
        if not self.dataset_name:
            raise ConfigError("dataset_name is missing: name a .jsonl, .json, .csv or .parquet file, or a dataset")
        if self.output_file is None:
            if self.dry_run:
                return
            raise ConfigError("output_file is missing: name the .jsonl file the completions go to")
        if Path(self.output_file).is_dir():
            raise ConfigError(f"output_file {self.output_file} is a folder; name a file in it")
        if Path(self.output_file).suffix != ".jsonl":
            raise ConfigError(f"output_file {self.output_file} must end in .jsonl, which `trl-distill train` reads")

    def template(self) -> PromptTemplate | None:
        """The parsed `teacher_prompt_template`."""
        if self.teacher_prompt_template is None:
            return None
        return PromptTemplate.parse(self.teacher_prompt_template, "teacher_prompt_template")

    @property
    def generation(self) -> Generation:
        """How the teacher writes."""
        return Generation(self.max_new_tokens, self.generation_temperature)

    @property
    def teacher(self) -> tuple[Any, dict[str, Any]]:
        """Which teacher, and what it is loaded with."""
        given: Any = self.teacher_model_init_kwargs or {}
        return self.teacher_model_name_or_path, given

    @property
    def teacher_name(self) -> str:
        """How records name the teacher: with the revision, if one was chosen."""
        revision = self.teacher[1].get("revision")
        return f"{self.teacher_model_name_or_path}{f'@{revision}' if revision else ''}"


def parse(argv: list[str]) -> GenerateArguments:
    """The options of a run; flags win over the config, in which those of training alone are passed over.

    Raises:
        ConfigError: an option is unknown, malformed, out of range or missing.
    """
    (arguments,), in_config, in_flags = parse_options(argv, (GenerateArguments,), COMMAND)
    own, training = option_names([GenerateArguments]), training_options()
    pairs = zip(in_config[::2], in_config[1::2], strict=True)
    strangers = [word for pair in pairs if pair[0].removeprefix("--") not in training for word in pair]
    check_known([*strangers, *in_flags], [*own, *training] if strangers else own, COMMAND)
    arguments.check_complete()
    return arguments


def _mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A mapping as it is, or out of a JSON string from the command line."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON ({error}): {value!r}") from None
    if parsed is not None and not isinstance(parsed, dict):
        raise ConfigError(f"{name} must be a mapping of names to values, got {value!r}")
    return parsed
