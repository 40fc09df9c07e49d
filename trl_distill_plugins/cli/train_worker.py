"""The training run itself: what `accelerate launch` starts on each device. The one module in `cli` that imports TRL."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from datasets import load_dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_distill_plugins.cli.main import guarded
from trl_distill_plugins.errors import ConfigError, DataError
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
class TrainArguments(ScriptArguments):  # type: ignore[misc]
    """What to train on, and with which trainer.

    Args:
        trainer: `sft` on given or teacher-written completions, `gkd` on completions the student writes itself.
        dataset_name: a .jsonl, .json, .csv or .parquet file of inputs, or a dataset path or hub name.
        eval_dataset_name: likewise, held out; evaluated as `eval_strategy` says.
    """

    trainer: Literal["sft", "gkd"] = field(
        default="sft", metadata={"help": "sft: given or teacher-written completions; gkd: the student's own."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows: a file, or a dataset path or hub name."}
    )


def main(argv: list[str]) -> int:
    """Parse, train, save."""
    trainer_name = _peek(argv, "trainer") or "sft"
    if trainer_name not in _TRAINERS:
        raise ConfigError(f"no trainer named {trainer_name!r}; trainers: {', '.join(_TRAINERS)}")
    config_class, trainer_class = _TRAINERS[trainer_name]
    parser = TrlParser((TrainArguments, config_class, ModelConfig), prog="trl-distill train")
    arguments, training, model = _parse(parser, argv)
    if not model.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name the student, by path or hub name")
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
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


def _peek(argv: list[str], name: str) -> str | None:
    """The value of one option, from the flags or the `--config` file, before the parser is built."""
    for position, flag in enumerate(argv):
        if flag == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if flag.startswith(f"--{name}="):
            return flag.partition("=")[2]
    if name == "config":
        return None
    path = _peek(argv, "config")
    return None if path is None else _read_config(path).get(name)


def _read_config(path: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"the config file {path} must be a mapping of options to values")
    return config


def _parse(parser: Any, argv: list[str]) -> tuple[Any, ...]:
    try:
        return parser.parse_args_and_config(argv)  # type: ignore[no-any-return]
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error).strip()) from error


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
    return wanted  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(guarded("train", main, sys.argv[1:]))
