"""A disk that fills up under `trl-distill train` and `generate`, on a real small file system."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import run_options, write_rows
from trl_distill_plugins.cli.generate.arguments import COMMAND as GENERATE
from trl_distill_plugins.cli.generate.worker import MODULE

_CAN_MOUNT = shutil.which("unshare") is not None and (
    subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True).returncode == 0
)
pytestmark = pytest.mark.skipif(not _CAN_MOUNT, reason="user namespaces are off here, so no small disk can be mounted")

# Runs the worker on small disks, one after the other, and prints what is left on each. The mounts end with the process.
SCRIPT = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from trl_distill_plugins.cli import worker
reports = {}
for name, (disk, size, *call) in json.loads(sys.argv[1]).items():
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = worker.run(*call)
    files = [path for path in Path(disk).rglob("*") if path.is_file()]
    left = {str(path.relative_to(disk)): path.read_text() if path.suffix == ".jsonl" else None for path in files}
    reports[name] = {"code": code, "error": said.getvalue(), "left": left}
Path(sys.argv[2]).write_text(json.dumps(reports))
"""

CASES = {  # what fills up: the size of the disk, and options
    "model": ("100k", {}),
    "checkpoint": ("1000k", {"save_strategy": "steps", "save_steps": 1}),
    "completions": ("12k", {"max_new_tokens": 2, "generation_batch_size": 5, "student_prompt_template": "{input}"}),
    "generate": ("12k", {"max_new_tokens": 2, "generation_batch_size": 5}),
    "final order": (
        "60k",
        {"max_new_tokens": 2, "generation_batch_size": 5},
    ),  # there is room for one file, not for two
}
GENERATING = {"generate", "final order"}
BARE = {"completions", *GENERATING}


@pytest.fixture(scope="module")
def reports(saved_models, tmp_path_factory):
    """Exit code, stderr and the files left on the disk by name, for each case."""
    folder = tmp_path_factory.mktemp("disks")
    pairs = [{"prompt": f"red {i} ?", "completion": " blue"} for i in range(8)]
    bare = [{"input": f"the lazy dog {i} " * 20} for i in range(40)]
    cases = {}
    for name, (size, changes) in CASES.items():
        rows = write_rows(folder / f"{name}.jsonl", bare if name in BARE else pairs)
        (folder / name).mkdir()
        options = run_options(saved_models, rows, folder / name / "out") | changes
        config = folder / f"{name}.yaml"
        config.write_text(json.dumps(options))
        if name in GENERATING:
            options["output_file"] = str(folder / name / "out" / "out.jsonl")
            config.write_text(json.dumps(options))
        command = [GENERATE, MODULE] if name in GENERATING else []
        cases[name] = (str(folder / name), size, ["--config", str(config)], *command)
    command = ["unshare", "-rm", sys.executable, "-c", SCRIPT, json.dumps(cases), str(folder / "reports.json")]
    subprocess.run(command, check=True, timeout=240, stdout=subprocess.DEVNULL)
    return json.loads((folder / "reports.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_line_that_names_what_was_written(name, reports):
    what = {"model": ".partial", "checkpoint": "checkpoint-2", "completions": "teacher_completions.jsonl"}
    assert reports[name]["code"] == 1
    (line,) = (line for line in reports[name]["error"].splitlines() if line.startswith(("trl-distill", "Traceback")))
    command = GENERATE if name in GENERATING else "trl-distill train"
    assert line.startswith(f"{command}: error: no space left on the disk while writing '")
    assert line.endswith(f"{name}/out/{what.get(name, 'out.jsonl')}'; free some, then run the same command again")


def test_the_final_save_leaves_no_part_of_a_model(reports):
    assert reports["model"]["left"] == {}


def test_a_checkpoint_is_whole_or_absent(reports):
    """The first checkpoint fits, the second does not. The README is the model card."""
    paths = [Path(name).relative_to("out") for name in reports["checkpoint"]["left"]]
    assert {path.parts[0] for path in paths} == {"checkpoint-1", "README.md"}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {path.name for path in paths}


@pytest.mark.parametrize("name", ["completions", "generate"])
def test_teacher_completions_keep_whole_lines(name, reports):
    (text,) = reports[name]["left"].values()
    assert text.endswith("\n")
    records = [json.loads(record) for record in text.splitlines()]
    assert 0 < len(records) < 40


def test_a_file_that_cannot_be_put_in_order_keeps_all_it_has(reports):
    (text,) = reports["final order"]["left"].values()
    assert len([json.loads(record) for record in text.splitlines()]) == 40
