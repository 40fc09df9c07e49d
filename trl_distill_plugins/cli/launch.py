"""Start a worker module on one or many processes through `accelerate launch`, and get its exit code back.

What accelerate does not do by itself, and this module adds:

- without a config it runs one process on one thread; here the machine decides: CPU with all its cores, one
  accelerator, or one process per accelerator (a config made with `accelerate config` goes first);
- for several processes on the CPU it needs ACCELERATE_USE_CPU=true in the environment, or each process is a world of
  its own; a config's `use_cpu: true` alone is not passed on to them;
- a failed worker ends it in a traceback; here its exit code is returned.
"""

import contextlib
import io
import logging
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from trl_distill_plugins.errors import ConfigError, did_you_mean

CONFIG_FLAG = "--accelerate_config"

# The flags of `accelerate launch` that are taken out of a command's arguments. Each has a value, and none is a training
# argument. Everything else accelerate knows belongs into a config file.
LAUNCH_FLAGS = (
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--mixed_precision",
    "--gpu_ids",
    "--num_cpu_threads_per_process",
    "--rdzv_backend",
    "--rdzv_conf",
    "--max_restarts",
)

INTERRUPT_GRACE_SECONDS = 5.0


def config_folder() -> Path:
    """Return the folder of the shipped configs: in the package when installed, else beside it in the repository."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "accelerate_configs"
    return inside if inside.is_dir() else package.parent / "accelerate_configs"


def resolve_config(name_or_file: str) -> Path:
    """Return the path of an accelerate config: one of the shipped ones by its name, or a file."""
    shipped = {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}
    path = shipped.get(name_or_file, Path(name_or_file))
    if not path.is_file():
        hint = did_you_mean(name_or_file, shipped) or "."
        raise ConfigError(
            f"{CONFIG_FLAG} {name_or_file!r} is neither a file nor a shipped config{hint} Shipped: {', '.join(shipped)}"
        )
    return path


def resolve_launch_args(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split `argv` into the arguments of `accelerate launch` and the rest, both in order.

    `--accelerate_config NAME_OR_FILE` becomes `--config_file PATH`.
    """
    accelerate_args: list[str] = []
    train_args: list[str] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        if flag not in (CONFIG_FLAG, *LAUNCH_FLAGS):
            train_args.append(argument)
            continue
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value")
            value = remaining.pop(0)
        if flag == CONFIG_FLAG:
            flag, value = "--config_file", str(resolve_config(value))
        accelerate_args += [flag, value]
    return accelerate_args, train_args


def launch(module: str, accelerate_args: list[str], train_args: list[str]) -> int:
    """Run `python -m module *train_args` as `accelerate launch` does, wait, and return the exit code.

    With several processes it is the code of the first that failed. A process ended by signal n counts as 128 + n. The
    worker itself says what went wrong; nothing is printed here.
    """
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args, environment = _prepare(module, accelerate_args, train_args)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").disabled = True  # it sets its own level on import
    try:
        with patch_environment(**environment):
            launch_command(args)
    except subprocess.CalledProcessError as error:
        return exit_code(error.returncode)
    except ChildFailedError as error:
        return exit_code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + error.sigval
    except KeyboardInterrupt:
        _end_children()
        return 128 + signal.SIGINT
    except (ValueError, ImportError) as error:  # a wrong config, or DeepSpeed that is not installed
        raise ConfigError(f"accelerate launch: {error}") from error
    return 0


def leave_process_group() -> None:
    """End this process's part in the process group. A worker calls it before it exits: gloo may abort otherwise."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _prepare(module: str, accelerate_args: list[str], train_args: list[str]) -> tuple[Any, dict[str, str]]:
    """Return the parsed arguments of `accelerate launch`, and what to add to the environment."""
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    given = dict(zip(accelerate_args[::2], accelerate_args[1::2], strict=True))
    _check_number("--num_processes", given)
    _check_number("--num_machines", given)
    if "--config_file" not in given:
        given["--config_file"] = default_config_file if os.path.isfile(default_config_file) else _default_config(given)
    config = _read_config(given["--config_file"])
    processes = int(given.get("--num_processes", config.get("num_processes", 1)))
    if config.get("main_process_port") is None and int(given.get("--num_machines", config.get("num_machines", 1))) == 1:
        given.setdefault("--main_process_port", "0")  # a free one
    on_cpu = bool(config.get("use_cpu"))
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        given.setdefault("--num_cpu_threads_per_process", str(_threads(processes)))
    flags = [part for pair in given.items() for part in pair]
    parsed_errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(parsed_errors):
            args = launch_command_parser().parse_args([*flags, "-m", module, *train_args])
    except SystemExit:
        raise ConfigError(parsed_errors.getvalue().strip().splitlines()[-1]) from None
    return args, {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}


def _check_number(flag: str, given: dict[str, str]) -> None:
    value = given.get(flag, "1")
    if not (value.isdecimal() and int(value) >= 1):
        raise ConfigError(f"{flag} must be a whole number of at least 1, got {value!r}")


def _default_config(given: dict[str, str]) -> str:
    """Return the shipped config that fits this machine, and set the number of processes when nobody has."""
    import torch

    accelerators = torch.accelerator.device_count()
    processes = int(given.setdefault("--num_processes", str(max(1, accelerators))))
    kind = "gpu" if accelerators else "cpu"
    name = f"multi_{kind}" if processes > 1 else {"gpu": "single_gpu", "cpu": "cpu"}[kind]
    return str(config_folder() / f"{name}.yaml")


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the accelerate config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"the accelerate config {path} must be a mapping of options, such as `num_processes: 2`")
    return config


def _threads(processes: int) -> int:
    import torch

    return max(1, torch.get_num_threads() // processes)


def exit_code(code: int) -> int:
    """What a shell calls the return code of a process: one ended by signal n is 128 + n."""
    return code if code >= 0 else 128 - code


def _end_children() -> None:
    """Let the worker finish after Ctrl-C, which a terminal sends to it too; end it when it does not."""
    import psutil

    _, alive = psutil.wait_procs(psutil.Process().children(), timeout=INTERRUPT_GRACE_SECONDS)
    for child in alive:
        child.terminate()
