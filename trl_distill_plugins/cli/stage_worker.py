"""What stages need done in a process that imports torch and TRL: reading their configs, merging adapters."""

import sys
from pathlib import Path
from typing import Any

from trl_distill_plugins.cli.worker import exit_with, run
from trl_distill_plugins.errors import ConfigError, DistillError


def main(argv: list[str]) -> int:
    """`check (NAME COMMAND CONFIG)...` reads the configs of stages; `merge FOLDER TARGET` puts an adapter into its
    model's weights."""
    if argv[0] == "check":
        for name, command, config in zip(argv[1::3], argv[2::3], argv[3::3], strict=True):
            _check(name, command, config)
    else:
        _merge(Path(argv[1]), Path(argv[2]))
    return 0


def _check(name: str, command: str, config: str) -> None:
    from trl_distill_plugins.cli.generate import arguments
    from trl_distill_plugins.cli.train_worker import parse_arguments
    from trl_distill_plugins.teachers import check_teacher

    argv = ["--config", config]
    try:
        options: Any = arguments.parse(argv) if command == "generate" else parse_arguments(argv)[1]
        check_teacher(options.teacher_model_name_or_path, options.teacher_model_init_kwargs)
    except DistillError as error:
        raise ConfigError(f"stage {name}: {error}") from error


def _merge(folder: Path, target: Path) -> None:
    """Save the model in `folder`, whose weights are an adapter's, with the adapter in the weights."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from trl_distill_plugins.trainers.saving import whole_or_nothing

    with whole_or_nothing(target):
        model = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        model.merge_and_unload().save_pretrained(str(target))
        AutoTokenizer.from_pretrained(str(folder)).save_pretrained(str(target))


if __name__ == "__main__":
    exit_with(run(sys.argv[1:], "trl-distill train", "trl_distill_plugins.cli.stage_worker"))
