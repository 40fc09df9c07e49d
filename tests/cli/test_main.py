"""`trl-distill` itself: help, choice of a command, and what a failure looks like."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from trl_distill_plugins import __version__
from trl_distill_plugins.cli import guard, main
from trl_distill_plugins.errors import DataError

FULL_DISK = Path("/dev/full")


def trl_distill(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "trl_distill_plugins.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function that adds a command `broken` whose `run` has the given body, and runs it in this process."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the module is written again within a second
    monkeypatch.delenv(guard.DEBUG_VARIABLE, raising=False)

    def run(body: str, *arguments: str) -> int:
        source = "from trl_distill_plugins.errors import DataError\n\ndef run(argv):\n"
        (tmp_path / "broken_command.py").write_text(source + "".join(f"    {line}\n" for line in body.splitlines()))
        importlib.invalidate_caches()
        sys.modules.pop("broken_command", None)
        monkeypatch.setitem(main.COMMANDS, "broken", ("broken_command", "fails"))
        return main.main(["broken", *arguments])

    yield run
    sys.modules.pop("broken_command", None)
    os.environ.pop(guard.DEBUG_VARIABLE, None)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", ["--output_dir", "--config FILE", "--num_processes N", "a list of `stages`"]),
        ("generate", ["--output_file", "--config FILE", "--num_processes N"]),
        ("cache build", ["--cache_dir", "--config FILE", "--num_processes N"]),
    ],
)
def test_the_help_of_a_command_needs_no_option_and_names_what_it_takes(command, told, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        main.main([*command.split(), "--help"])
    assert exit.value.code == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert listed.startswith(f"usage: trl-distill {command} ")
    assert [text for text in told if text not in listed] == []


def test_help_lists_the_commands_and_imports_none_of_them():
    start = time.perf_counter()
    result = trl_distill("--help")
    assert time.perf_counter() - start < 1.0
    assert result.returncode == 0
    assert all(f"    {name} " in result.stdout for name in main.COMMANDS)
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trl_distill_plugins.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    loaded = {line.rpartition("|")[2].strip() for line in imports.splitlines()}
    assert "trl_distill_plugins.cli.guard" in loaded
    assert not loaded & {"torch", "rich", "pluggy", "yaml", *(module for module, _ in main.COMMANDS.values())}


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag):
    assert trl_distill(flag).stdout == f"trl-distill {__version__}\n"


def test_no_command_prints_the_help_and_exits_2():
    result = trl_distill()
    assert result.returncode == 2
    assert result.stdout == ""
    assert "usage: trl-distill" in result.stderr


def test_an_unknown_command_gets_a_suggestion():
    result = trl_distill("trian")
    assert result.returncode == 2
    assert result.stderr == (
        f"trl-distill: error: no command 'trian'; did you mean 'train'? Commands: {', '.join(main.COMMANDS)}\n"
    )


def test_arguments_reach_the_command(command):
    assert command("return len(argv)", "a", "--help", "-V") == 3


def test_bad_input_is_one_line_and_exit_code_2(command, capsys):
    assert command("raise DataError('rows.jsonl, row 3: no column \"x\"\\nadd it')") == 2
    assert capsys.readouterr().err == 'trl-distill broken: error: rows.jsonl, row 3: no column "x" add it\n'


@pytest.mark.parametrize("arguments", [["--debug"], ["--x", "1", "--debug", "--y"]])
def test_debug_shows_the_traceback_keeps_the_exit_code_and_is_not_passed_on(command, capsys, arguments):
    rest = [argument for argument in arguments if argument != "--debug"]
    assert command(f"assert argv == {rest!r}, argv\nraise DataError('bad row')", *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("\ntrl-distill broken: error: bad row\n")


def test_debug_reaches_the_processes_a_command_starts(command):
    probe = f"import os; print(os.environ.get({guard.DEBUG_VARIABLE!r}))"
    body = f"import subprocess, sys\nout = subprocess.check_output([sys.executable, '-c', {probe!r}])\nreturn int(out)"
    assert command(body, "--debug") == 1


def test_ctrl_c_is_one_line_and_exit_code_130(command, capsys):
    body = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time; time.sleep(5)"
    assert command(body) == 130
    assert capsys.readouterr().err == "trl-distill broken: interrupted\n"


@pytest.mark.skipif(not FULL_DISK.is_char_device(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "body",
    [
        "with open('/dev/full', 'w') as file:\n    file.write('x')",
        "import torch\ntorch.save(torch.zeros(100000), '/dev/full')",
        "try:\n with open('/dev/full', 'wb', 0) as f:\n  f.write(b'x')\nexcept OSError as e:\n raise KeyError from e",
    ],
    ids=["open", "torch.save", "wrapped"],
)
def test_a_full_disk_is_one_line_and_exit_code_1(command, capsys, body):
    assert command(body) == 1
    error = capsys.readouterr().err
    assert error == (
        "trl-distill broken: error: no space left on the disk; free some, then run the same command again\n"
    )


def test_a_full_disk_names_the_file_when_the_error_does(command, capsys):
    assert command("import errno\nraise OSError(errno.ENOSPC, 'full', 'out/model.bin')") == 1
    assert "no space left on the disk while writing 'out/model.bin'; free some" in capsys.readouterr().err


def test_a_full_disk_under_safetensors_is_known_by_its_text(command, capsys):
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert command(f"from safetensors import SafetensorError\nraise SafetensorError({text!r})") == 1
    assert "no space left on the disk" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(command):
    with pytest.raises(ZeroDivisionError):
        command("return 1 // 0")
    with pytest.raises(FileNotFoundError):
        command("open('/no/such/file')")


def test_guarded_returns_the_code_of_the_call():
    assert guard.guarded("x", lambda: 7) == 7
    assert guard.guarded("x", lambda: (_ for _ in ()).throw(DataError("bad"))) == 2


@pytest.fixture(scope="module")
def two_plugins(tmp_path_factory) -> Path:
    """A folder with two installed distributions: one brings a loss with options, one cannot be imported."""
    site = tmp_path_factory.mktemp("site")
    (site / "good_one.py").write_text(
        dedent("""
        from dataclasses import dataclass, field
        from trl_distill_plugins import Loss, hookimpl

        @dataclass(frozen=True)
        class Options:
            scale: float
            power: int = 2
            parts: list[int] = field(default_factory=lambda: [1, 2])

        class Mine(Loss):
            name = "mine"
            Options = Options

        @hookimpl
        def register_losses():
            return [Mine]
        """)
    )
    (site / "bad_one.py").write_text("import no_such_module_anywhere")
    for name in ("good_one", "bad_one"):
        info = site / f"{name}-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[trl_distill_plugins]\n{name} = {name}\n")
    return site


def with_site(site: Path) -> str:
    return os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))


def test_plugins_as_json(two_plugins):
    result = trl_distill("plugins", "--json", PYTHONPATH=with_site(two_plugins))
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    (mine,) = (entry for entry in report["installed"] if entry["name"] == "mine")
    assert mine == {
        "kind": "loss",
        "name": "mine",
        "class": "good_one.Mine",
        "plugin": "good_one",
        "distribution": "good-one",
        "version": "2.5",
        "options": {"scale": "required", "power": 2, "parts": [1, 2]},
        "conflict": "",
    }
    (bad,) = report["broken"]
    assert (bad["plugin"], bad["distribution"], bad["version"], bad["hook"]) == ("bad_one", "bad-one", "2.5", "")
    assert "No module named 'no_such_module_anywhere'" in bad["reason"]


def test_plugins_as_a_table_survives_a_broken_one_and_says_why(two_plugins):
    result = trl_distill("plugins", PYTHONPATH=with_site(two_plugins), COLUMNS="140")
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = (line for line in result.stdout.splitlines() if " mine " in line)
    assert "good-one 2.5" in row
    assert "scale=required, power=2, parts=[1, 2]" in row
    assert " forward_kl " in result.stdout
    assert "plugin 'bad_one' (bad-one 2.5) is disabled: loading 'bad_one' raised ModuleNotFoundError" in result.stdout
