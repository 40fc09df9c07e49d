"""`trl-distill train`: hand the arguments to accelerate, which starts one worker a device."""

import importlib
from pathlib import Path
from typing import Any

from trl_distill_plugins.cli.launch import CONFIG_FLAG, LAUNCH_FLAGS, launch, resolve_launch_args
from trl_distill_plugins.errors import ConfigError

COMMAND = "trl-distill train"
LAUNCH_OPTIONS = tuple(flag.removeprefix("--") for flag in (CONFIG_FLAG, *LAUNCH_FLAGS))


def run(argv: list[str]) -> int:
    """Train, in stages where the config lists some; return the exit code of the workers."""
    config = {} if wants_help(argv) else read_config(argv)
    if "stages" in config:
        from trl_distill_plugins.cli.stages import run_stages

        return run_stages(config, argv, _train)
    return _train(argv)


def _train(argv: list[str]) -> int:
    return run_workers("trl_distill_plugins.cli.worker", "trl_distill_plugins.cli.train_worker", argv)


def run_workers(module: str, main_module: str, argv: list[str]) -> int:
    """Start `module` on every device with the arguments of a training run; `main_module` prints the help here."""
    if wants_help(argv):
        code: int = importlib.import_module(main_module).main(argv)
        return code
    accelerate_args, worker_args = resolve_launch_args([*_launch_flags_in(read_config(argv)), *argv])
    return launch(module, accelerate_args, worker_args)


def _launch_flags_in(config: dict[str, Any]) -> list[str]:
    """The options of a config file that are for `accelerate launch`, as flags; real flags come after and win."""
    return [part for name in LAUNCH_OPTIONS if name in config for part in (f"--{name}", str(config[name]))]


def wants_help(argv: list[str]) -> bool:
    """Whether the options are to be listed, not used."""
    return "-h" in argv or "--help" in argv


def epilog_of(command: str) -> str:
    """What the help of a command that takes the options of training says behind them."""
    text = (
        "Options may stand in a YAML file, --config FILE; flags win. Also taken: --accelerate_config NAME_OR_FILE, "
        "options of `accelerate launch` such as --num_processes N, and --debug, which shows tracebacks."
    )
    stages = (
        " A config with a list of `stages` makes several runs, one after the other: each item holds the options of "
        "one, with `command: generate` where it is one of `trl-distill generate`."
    )
    return text + stages if command == COMMAND else text


def option_in(argv: list[str], name: str) -> str | None:
    """The value of a flag, or None where it is not given."""
    for position, flag in enumerate(argv):
        if flag == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if flag.startswith(f"--{name}="):
            return flag.partition("=")[2]
    return None


def read_config(argv: list[str]) -> dict[str, Any]:
    """The contents of the `--config` file; empty without one. Raise `ConfigError` if it cannot be used."""
    import yaml

    path = option_in(argv, "config")
    if path is None:
        return {}
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"the config file {path} must be a mapping of options to values")
    return config
