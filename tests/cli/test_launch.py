"""Starting workers through accelerate: real processes, real exit codes."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from trl_distill_plugins.cli import launch
from trl_distill_plugins.errors import ConfigError

CONFIGS = ["cpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "multi_cpu", "multi_gpu", "single_gpu"]

WORKER = """
    import os, sys, time

    from trl_distill_plugins.cli.launch import leave_process_group

    def world():
        import torch
        from accelerate import Accelerator
        accelerator = Accelerator()
        ranks = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
        if accelerator.is_main_process:
            print("WORLD", accelerator.num_processes, ranks, backend, accelerator.device.type, flush=True)
        leave_process_group()

    action, *values = sys.argv[1:]
    if action == "world":
        world()
    elif action == "exit":
        sys.exit(int(values[0]) if os.environ.get("RANK", "0") == "0" else 0)
    elif action == "threads":
        import torch
        print("THREADS", torch.get_num_threads(), flush=True)
    elif action == "die":
        os.kill(os.getpid(), 9)
    elif action == "sleep":
        print("SLEEPING", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            print("WORKER STOPPED", flush=True)
            sys.exit(130)
"""

DRIVER = """
import sys
from trl_distill_plugins.cli.launch import launch, resolve_launch_args
accelerate_args, train_args = resolve_launch_args(sys.argv[1:])
sys.exit(launch("tiny_worker", accelerate_args, train_args))
"""


@pytest.fixture
def start(tmp_path):
    """A function that starts the driver with arguments, in a session of its own, and returns the process."""
    (tmp_path / "tiny_worker.py").write_text(dedent(WORKER))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def start(*arguments: str, **extra: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment | {"PYTHONPATH": path, "HF_HOME": str(tmp_path)} | extra,
        )

    return start


@pytest.fixture
def run(start):
    def run(*arguments: str, **extra: str) -> tuple[int, str, str]:
        process = start(*arguments, **extra)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return run


@pytest.mark.parametrize("name", CONFIGS)
def test_a_name_resolves_to_the_shipped_config(name):
    assert launch.resolve_config(name).name == f"{name}.yaml"


def test_the_shipped_configs_are_exactly_these():
    assert sorted(path.stem for path in launch.config_folder().iterdir()) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_accepts_every_shipped_config(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(launch.resolve_config(name)))  # raises for a key it does not know
    assert config.num_processes == (1 if name in ("cpu", "single_gpu") else 2)
    assert config.use_cpu == (name in ("cpu", "multi_cpu"))


def test_a_path_is_taken_as_it_is(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("num_processes: 1\n")
    assert launch.resolve_launch_args(["--accelerate_config", str(mine)]) == (["--config_file", str(mine)], [])


def test_flags_are_split_in_order_with_and_without_an_equals_sign():
    accelerate_args, train_args = launch.resolve_launch_args(
        ["--config", "a.yaml", "--num_processes=2", "--output_dir", "o", "--main_process_port", "0", "--bf16"]
    )
    assert accelerate_args == ["--num_processes", "2", "--main_process_port", "0"]
    assert train_args == ["--config", "a.yaml", "--output_dir", "o", "--bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--accelerate_config", "multicpu"],
            "neither a file nor a shipped config; did you mean 'multi_cpu'[?]",
        ),
        (["--accelerate_config"], "--accelerate_config needs a value"),
        (["--num_processes", "--bf16"], "--num_processes needs a value"),
    ],
)
def test_bad_launch_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        launch.resolve_launch_args(arguments)


@pytest.mark.parametrize(
    ("accelerate_args", "message"),
    [
        (["--num_processes", "0"], "--num_processes must be a whole number of at least 1, got '0'"),
        (["--num_processes", "two"], "--num_processes must be a whole number of at least 1, got 'two'"),
        (["--mixed_precision", "fp7"], "--mixed_precision.*invalid choice: 'fp7'"),
    ],
)
def test_bad_values_are_config_errors_before_anything_starts(accelerate_args, message):
    with pytest.raises(ConfigError, match=message):
        launch.launch("no_such_module", accelerate_args, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a mapping"),
        ("a: [", "cannot read the accelerate config"),
        ('distributed_type: "NO"\ncolour: red', "colour"),
    ],
)
def test_a_bad_config_file_is_a_config_error(tmp_path, text, message):
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(ConfigError, match=message):
        launch.launch("no_such_module", ["--config_file", str(bad)], [])


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed here")
def test_deepspeed_that_is_not_installed_is_a_config_error():
    with pytest.raises(ConfigError, match="DeepSpeed is not installed"):
        launch.launch("no_such_module", ["--config_file", str(launch.resolve_config("deepspeed_zero2"))], [])


def test_the_launch_flags_are_accelerates_and_no_training_arguments():
    from accelerate.commands.launch import launch_command_parser
    from transformers import TrainingArguments

    accelerates = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    assert set(launch.LAUNCH_FLAGS) <= accelerates
    training = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments)}
    assert not training & {launch.CONFIG_FLAG, *launch.LAUNCH_FLAGS}


@pytest.mark.parametrize("code", [0, 1, 2])
def test_one_process_returns_the_workers_exit_code_and_prints_nothing(run, code):
    assert run("exit", str(code), CUDA_VISIBLE_DEVICES="") == (code, "", "")


def test_two_processes_return_the_failed_workers_exit_code_and_print_nothing(run):
    assert run("--accelerate_config", "multi_cpu", "exit", "2") == (2, "", "")


@pytest.mark.parametrize("flags", [["--accelerate_config", "cpu"], ["--accelerate_config", "multi_cpu"]])
def test_a_killed_worker_counts_as_128_plus_the_signal(run, flags):
    assert run(*flags, "die")[0] == 128 + 9


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        (["--accelerate_config", "cpu"], "WORLD 1 [0] None cpu"),
        (["--accelerate_config", "multi_cpu"], "WORLD 2 [0, 1] gloo cpu"),
        (["--num_processes", "2"], "WORLD 2 [0, 1] gloo cpu"),
        ([], "WORLD 1 [0] None cpu"),
    ],
    ids=["cpu", "multi_cpu", "num_processes", "default"],
)
def test_the_processes_are_one_world(run, flags, world):
    code, out, err = run(*flags, "world", CUDA_VISIBLE_DEVICES="")
    assert (code, out.strip()) == (0, world), err


def test_one_cpu_process_gets_the_threads_torch_would_take(run):
    alone = subprocess.check_output(
        [sys.executable, "-c", "import torch; print('THREADS', torch.get_num_threads())"],
        text=True,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    assert run("--accelerate_config", "cpu", "threads")[1] == alone
    assert run("--accelerate_config", "cpu", "threads", OMP_NUM_THREADS="1")[1] == "THREADS 1\n"


@pytest.mark.parametrize("flags", [["--accelerate_config", "cpu"], ["--accelerate_config", "multi_cpu"]])
def test_ctrl_c_stops_the_workers_and_returns_130(start, flags):
    process = start(*flags, "sleep")
    assert process.stdout is not None
    assert process.stdout.readline() == "SLEEPING\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "WORKER STOPPED" in out
    assert err == ""


def test_ctrl_c_to_the_launcher_alone_leaves_no_worker_behind(start):
    process = start("--accelerate_config", "cpu", "sleep")
    assert process.stdout is not None
    assert process.stdout.readline() == "SLEEPING\n"
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not Path(f"/proc/{worker}").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
