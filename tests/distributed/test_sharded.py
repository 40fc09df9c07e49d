"""A student and a teacher sharded over two processes follow one process's curve. Minutes: `make test-distributed`."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.distributed.conftest import greatest_difference

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("ninja") is None,
    reason="DeepSpeed or ninja, with which it compiles on first use, is not installed",
)

TEMPLATES = {"teacher_prompt_template": "the quick brown fox {input}", "student_prompt_template": "{input}"}
# accelerate's own device and back end: with use_cpu, DeepSpeed and FSDP would be off without a word.
SHARDED = {"use_cpu": False, "ddp_backend": "gloo"}
TRAINERS = {
    "sft": {"distill_alpha": 0.7},
    "gkd, dataset's completions": {"trainer": "gkd", "lmbda": 0.0},
    "gkd, student's completions": {"trainer": "gkd", "lmbda": 1.0, "temperature": 1e-7, "max_new_tokens": 6},
}
FSDP_COMMAND = """
import sys
from trl_distill_plugins.cli.launch import launch, resolve_launch_args
sys.exit(launch("tests.distributed.fsdp_worker", *resolve_launch_args(sys.argv[1:])))
"""
TOLERANCE = 1e-4  # sums over shards come in another order


@pytest.fixture(scope="module", params=TRAINERS)
def case(request, run_on, paired_rows):
    """The options of a run, and what one process makes of them."""
    options = TEMPLATES | TRAINERS[request.param]
    return options, run_on(1, paired_rows, **options)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, case, run_on, paired_rows):
    options, one = case
    flags = ["--accelerate_config", f"deepspeed_zero{stage}"]
    two = run_on(2, paired_rows, flags, **options, **SHARDED)
    print(stage, greatest_difference(two, one))
    assert max(greatest_difference(two, one).values()) < TOLERANCE


def test_fsdp2(case, run_on, paired_rows, monkeypatch):
    options, one = case
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))))
    command = [sys.executable, "-c", FSDP_COMMAND]
    two = run_on(2, paired_rows, ["--accelerate_config", "fsdp2"], command, **options, **SHARDED)
    print("fsdp2", greatest_difference(two, one))
    assert max(greatest_difference(two, one).values()) < TOLERANCE
