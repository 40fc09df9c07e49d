"""The scripts for `accelerate launch` are commands of `trl-distill`, those that train with their trainer chosen."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "entrypoints"


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("distill_sft.py", ["--lmbda", "0.5"], "no option 'lmbda'"),  # GKD's option
        ("distill_gkd.py", ["--lmbda", "2"], "lmbda must be in the range"),
        ("cache_teacher.py", [], "cache_dir is missing"),
    ],
)
def test_each_script_has_its_trainers_options_and_says_bad_input_in_a_line(script, flags, message, tmp_path):
    options = ["--model_name_or_path", "student", "--dataset_name", "rows.jsonl", "--output_dir", str(tmp_path), *flags]
    done = subprocess.run(
        [sys.executable, FOLDER / script, *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    command = "cache build" if script == "cache_teacher.py" else "train"
    assert f"trl-distill {command}: error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
