"""A disk that fills up under `trl-distill train`, on a real small file system."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import write_rows

_CAN_MOUNT = shutil.which("unshare") is not None and (
    subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True).returncode == 0
)
pytestmark = pytest.mark.skipif(not _CAN_MOUNT, reason="user namespaces are off here, so no small disk can be mounted")

# Mounts a disk of the given size, runs the worker on it, and prints what is left there. The mount ends with the process.
SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path
disk, size, *arguments = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
from trl_distill_plugins.cli import worker
code = worker.run(arguments)
files = [path for path in Path(disk).rglob("*") if path.is_file()]
left = {str(path.relative_to(disk)): path.read_text() if path.suffix == ".jsonl" else None for path in files}
print("REPORT", json.dumps({"code": code, "left": left}), flush=True)
"""


@pytest.fixture
def train_on_disk(options, write_config, tmp_path):
    """`train_on_disk(size, **changes)`: exit code, the line on stderr, and the files left on the disk by name."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def run(size, **changes):
        config = write_config(options | {"output_dir": str(disk / "out")} | changes)
        command = ["unshare", "-rm", sys.executable, "-c", SCRIPT, str(disk), size, "--config", str(config)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=240)
        reports = [line for line in process.stdout.splitlines() if line.startswith("REPORT ")]
        assert reports, process.stderr
        report = json.loads(reports[0].removeprefix("REPORT "))
        assert "Traceback" not in process.stderr
        (line,) = (line for line in process.stderr.splitlines() if line.startswith("trl-distill"))
        return report["code"], line, report["left"]

    return run


def test_the_final_save_leaves_no_part_of_a_model(train_on_disk):
    code, line, left = train_on_disk("100k")
    assert code == 1
    assert line.startswith("trl-distill train: error: no space left on the disk while writing '")
    assert line.endswith("out/.partial'; free some, then run the same command again")
    assert left == {}


def test_a_checkpoint_is_whole_or_absent(train_on_disk):
    """The first checkpoint fits, the second does not."""
    code, line, left = train_on_disk("1000k", save_strategy="steps", save_steps=1)
    assert code == 1
    assert "no space left on the disk while writing '" in line
    assert "out/checkpoint-2'; free some" in line
    assert {Path(name).parts[1] for name in left} == {"checkpoint-1"}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {Path(name).name for name in left}


def test_teacher_completions_keep_whole_lines(train_on_disk, tmp_path):
    rows = write_rows(tmp_path / "many.jsonl", [{"input": f"the lazy dog {i} " * 20} for i in range(40)])
    code, line, left = train_on_disk(
        "12k", dataset_name=str(rows), max_new_tokens=2, generation_batch_size=5, student_prompt_template="{input}"
    )
    assert code == 1
    assert "no space left on the disk while writing '" in line
    assert "out/teacher_completions.jsonl'; free some" in line
    (text,) = left.values()
    assert text.endswith("\n")
    records = [json.loads(record) for record in text.splitlines()]
    assert 0 < len(records) < 40
    assert len(records) % 5 == 0
