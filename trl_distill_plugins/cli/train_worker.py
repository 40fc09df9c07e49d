"""The training run itself. The one module in `cli` that imports TRL."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

from datasets import load_dataset
from transformers import AutoConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_distill_plugins.cli.train import COMMAND, LAUNCH_OPTIONS, epilog_of, option_in, read_config, wants_help
from trl_distill_plugins.errors import ConfigError, DataError, DistillError, did_you_mean, load_failure
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.prompts.files import is_data_file, load_rows, name_of
from trl_distill_plugins.prompts.rows import SourceRow
from trl_distill_plugins.trainers.configs import DistillGKDConfig, DistillSFTConfig
from trl_distill_plugins.trainers.gkd import DistillGKDTrainer
from trl_distill_plugins.trainers.saving import last_whole_checkpoint, save_whole
from trl_distill_plugins.trainers.sft import DistillSFTTrainer

_TRAINERS: dict[str, tuple[type[Any], type[Any]]] = {
    "sft": (DistillSFTConfig, DistillSFTTrainer),
    "gkd": (DistillGKDConfig, DistillGKDTrainer),
}


@dataclass
class TrainArguments(ScriptArguments):
    """What to train on, and with which trainer.

    Args:
        trainer: `sft` on given or teacher-written completions, `gkd` on completions the student writes itself.
        eval_dataset_name: held-out rows, a file or a dataset; evaluated as `eval_strategy` says.
    """

    trainer: Literal["sft", "gkd"] = field(
        default="sft", metadata={"help": "sft: given or teacher-written completions; gkd: the student's own."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows: a file, or a dataset path or hub name."}
    )


def main(argv: list[str]) -> int:
    """Parse, train, save."""
    arguments, training, model = parse_arguments(argv)
    _check_student(model, training.trust_remote_code)
    checkpoint = _checkpoint(training)
    trainer = make_trainer(arguments, training, model)
    trainer.train(resume_from_checkpoint=checkpoint)
    save_whole(trainer, training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    trainer.accelerator.print(f"Saved the student to {training.output_dir}")
    trainer.end()
    return 0


def parse_arguments(argv: list[str], *more: type[Any], command: str = COMMAND) -> tuple[Any, ...]:
    """The arguments of a run of `command`, from `--config` and flags; flags win.

    Returns what to train on (`TrainArguments`), the training arguments (`DistillSFTConfig` or `DistillGKDConfig`), the
    student (`ModelConfig`), and an object of each dataclass in `more`.

    Raises:
        ConfigError: an option is unknown, malformed, out of range or missing.
    """
    config = read_config(argv)
    if "stages" in config:
        raise ConfigError("stages run one after the other, each launched anew: use `trl-distill train`")
    name = str(option_in(argv, "trainer") or config.get("trainer", "sft"))
    if name not in _TRAINERS:
        raise ConfigError(f"no trainer named {name!r}{did_you_mean(name, _TRAINERS) or '.'} Trainers: sft, gkd")
    if not (wants_help(argv) or option_in(argv, "output_dir") or config.get("output_dir")):
        raise ConfigError("output_dir is missing: name the folder the student goes to")
    config_class, _ = _TRAINERS[name]
    classes = (TrainArguments, config_class, ModelConfig, *more)
    (arguments, training, model, *others), in_config, in_flags = parse_options(argv, classes, command)
    check_known([*in_config, *in_flags], option_names(classes), command)
    if not model.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name the student, by path or hub name")
    _check_training(training)
    quantization = get_quantization_config(model)  # GKDTrainer takes it here alone
    training.model_init_kwargs = {
        **({} if quantization is None else {"quantization_config": quantization}),
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return arguments, training, model, *others


def parse_options(
    argv: list[str], classes: tuple[type[Any], ...], command: str
) -> tuple[list[Any], list[str], list[str]]:
    """An object of each dataclass, from `--config` and flags; and what none of them takes: `--name` and value of each
    key of the config, and words of `argv`.

    Raises:
        ConfigError: an option is malformed or out of range.
    """
    parser = _Parser(classes, prog=command, epilog=epilog_of(command), allow_abbrev=False)
    parser.error = _refuse
    try:
        *parsed, in_config, in_flags = parser.parse_args_and_config(
            _config_apart(argv), return_remaining_strings=True, separate_remaining_strings=True
        )
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).strip()) from error
    return parsed, in_config, in_flags


def option_names(classes: Iterable[type[Any]]) -> list[str]:
    """The options that dataclasses make."""
    return [option.name for each in classes for option in fields(each)]


def training_options() -> set[str]:
    """Every option of `trl-distill train`, whichever the trainer."""
    configs = (config for config, _ in _TRAINERS.values())
    return {*option_names((TrainArguments, ModelConfig, *configs)), *LAUNCH_OPTIONS}


class _Parser(TrlParser):
    """`TrlParser` that checks the numbers of a config file as it checks those of flags."""

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """argparse converts defaults that are text, and refuses those it cannot convert."""
        numbers = {action.dest: action.type for action in self._actions if action.type in (int, float)}
        for option, value in config.items():
            wanted = int if numbers.get(option) is int else (int, float)
            if option in numbers and value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
                config[option] = str(value)
        return super().set_defaults_with_config(**config)


def _refuse(message: str) -> NoReturn:
    raise ConfigError(re.sub(r"/--[a-z0-9-]+", "", message, count=1))  # it names --max_steps and --max-steps


def _config_apart(argv: list[str]) -> list[str]:
    """`--config FILE` in two words: TrlParser does not know `--config=FILE`."""
    if argv and argv[-1] == "--config":
        raise ConfigError("argument --config: expected one argument")
    return [word for flag in argv for word in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]


def _check_student(model: ModelConfig, trust_remote_code: bool) -> None:
    name = str(model.model_name_or_path)
    try:
        AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the student {name!r}: {load_failure(name, error)}") from error


def _check_training(training: Any) -> None:
    """What the libraries would trip over later, without a word on the option."""
    for option in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        check_range(option, getattr(training, option), at_least=1)
    if Path(training.output_dir).is_file():
        raise ConfigError(f"output_dir {training.output_dir} is a file; name a folder")


def check_known(unknown: list[str], known: Iterable[str], command: str) -> None:
    """Raise `ConfigError` for options nobody takes; those for `accelerate launch` have been taken already."""
    names = [word.removeprefix("--").partition("=")[0] for word in unknown if word.startswith("--")]
    strangers = [name for name in names if name not in LAUNCH_OPTIONS]
    if strangers:
        hint = did_you_mean(strangers[0], known) or f"; `{command} --help` lists them"
        raise ConfigError(f"no option {strangers[0]!r}{hint}")
    if unknown and not names:
        raise ConfigError(f"unexpected argument {unknown[0]!r}; options are written --name value")


def make_trainer(arguments: TrainArguments, training: Any, model: ModelConfig) -> Any:
    """The trainer. What the libraries refuse while it is made is bad input: nothing has been trained."""
    train_dataset = _load(arguments, arguments.dataset_name, arguments.dataset_train_split, training)
    eval_dataset = _load_eval(arguments, training)
    _, trainer_class = _TRAINERS[arguments.trainer]
    try:
        return trainer_class(
            model=model.model_name_or_path,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=get_peft_config(model),
        )
    except DistillError:
        raise
    except (OSError, ValueError, ImportError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ConfigError(load_failure(str(model.model_name_or_path), error)) from error


def _load(arguments: TrainArguments, name: str | None, split: str, training: Any) -> Any:
    streaming = arguments.dataset_streaming
    dataset = load_any(name, split, arguments.dataset_config, training.input_column, streaming=streaming)
    first: dict[str, Any] = next(iter(dataset), {})
    templates = (training.student_prompt_template, training.teacher_prompt_template)
    if first and not any(templates) and not {"input_ids", training.dataset_text_field} & set(first):
        SourceRow(first, f"{name_of(dataset, split)}, row 1", training.input_column).own_prompt()
    return dataset


def load_any(
    name: str | None, split: str, config: str | None, input_column: str | None, *, streaming: bool = False
) -> Any:
    """The rows of a file, or of a dataset's split. Raise `ConfigError` without a name."""
    if not isinstance(name, str):
        raise ConfigError("dataset_name is missing: name a .jsonl, .json, .csv or .parquet file, or a dataset")
    if is_data_file(name):
        return load_rows(name, input_column=input_column)
    try:
        return load_dataset(name, name=config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the dataset {name!r}: {str(error).strip().splitlines()[0]}") from error


def _load_eval(arguments: TrainArguments, training: Any) -> Any:
    if arguments.eval_dataset_name is not None:
        return _load(arguments, arguments.eval_dataset_name, arguments.dataset_test_split, training)
    if training.eval_strategy == "no":
        return None
    if is_data_file(arguments.dataset_name or ""):
        raise ConfigError(f"eval_strategy is {training.eval_strategy!r}: name held-out rows in eval_dataset_name")
    return _load(arguments, arguments.dataset_name, arguments.dataset_test_split, training)


def _checkpoint(training: Any) -> str | None:
    """`resume_from_checkpoint: true` means the last checkpoint, or a fresh start where there is none yet."""
    wanted = training.resume_from_checkpoint
    if wanted in (True, "true", "True"):
        return last_whole_checkpoint(training.output_dir)
    if wanted in (None, False, "false", "False"):
        return None
    if not Path(wanted).is_dir():
        raise ConfigError(f"resume_from_checkpoint {wanted} is not a folder; `true` takes the last one in output_dir")
    return str(wanted)
