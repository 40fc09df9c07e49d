"""The training run itself. The one module in `cli` that imports TRL."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from datasets import load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_distill_plugins.cli.train import LAUNCH_OPTIONS, option_in, read_config
from trl_distill_plugins.errors import ConfigError, DataError, did_you_mean
from trl_distill_plugins.prompts.files import is_data_file, load_rows
from trl_distill_plugins.trainers.configs import DistillGKDConfig, DistillSFTConfig
from trl_distill_plugins.trainers.gkd import DistillGKDTrainer
from trl_distill_plugins.trainers.saving import save_whole
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
    name = option_in(argv, "trainer") or read_config(argv).get("trainer", "sft")
    if name not in _TRAINERS:
        raise ConfigError(f"no trainer named {name!r}; trainers: {', '.join(_TRAINERS)}")
    config_class, trainer_class = _TRAINERS[name]
    arguments, training, model = _parse(argv, config_class)
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=training,
        train_dataset=_load(arguments, arguments.dataset_name, arguments.dataset_train_split, training),
        eval_dataset=_load_eval(arguments, training),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=_checkpoint(training))
    save_whole(trainer, training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    trainer.accelerator.print(f"Saved the student to {training.output_dir}")
    trainer.end()
    return 0


def _parse(argv: list[str], config_class: type[Any]) -> tuple[Any, Any, Any]:
    """The arguments of the run, from `--config` and flags; flags win."""
    parser = TrlParser((TrainArguments, config_class, ModelConfig), prog="trl-distill train", allow_abbrev=False)
    parser.error = _refuse
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).strip()) from error
    _check_known(unknown, (action.dest for action in parser._actions))
    arguments, training, model = parsed
    if not model.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name the student, by path or hub name")
    if not training.output_dir:
        raise ConfigError("output_dir is missing: name the folder the student goes to")
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return arguments, training, model


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def _check_known(unknown: list[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for options nobody takes; those for `accelerate launch` have been taken already."""
    names = [word.removeprefix("--").partition("=")[0] for word in unknown if word.startswith("--")]
    strangers = [name for name in names if name not in LAUNCH_OPTIONS]
    if strangers:
        hint = did_you_mean(strangers[0], known) or "; `trl-distill train --help` lists them"
        raise ConfigError(f"no option {strangers[0]!r}{hint}")
    if unknown and not names:
        raise ConfigError(f"unexpected argument {unknown[0]!r}; options are written --name value")


def _load(arguments: TrainArguments, name: str | None, split: str, training: Any) -> Any:
    if name is None:
        raise ConfigError("dataset_name is missing: name a .jsonl, .json, .csv or .parquet file, or a dataset")
    if is_data_file(name):
        return load_rows(name, input_column=training.input_column)
    try:
        return load_dataset(name, name=arguments.dataset_config, split=split, streaming=arguments.dataset_streaming)
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
        return get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    return None if wanted in (False, "false", "False") else wanted
