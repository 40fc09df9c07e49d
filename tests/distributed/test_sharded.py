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
    "sft, teacher's completions": {"distill_alpha": 0.7, "max_new_tokens": 4, "generation_batch_size": 1},
    "sft, hidden states": {"losses": [{"name": "hidden_mse"}, {"name": "forward_kl", "weight": 0.5}]},
    "gkd, dataset's completions": {"trainer": "gkd", "lmbda": 0.0},
    "gkd, student's completions": {"trainer": "gkd", "lmbda": 1.0, "temperature": 1e-7, "max_new_tokens": 6},
}
LAUNCHER = """
import sys
from trl_distill_plugins.cli.launch import launch, resolve_launch_args
sys.exit(launch("tests.distributed.sharded_worker", *resolve_launch_args(sys.argv[1:])))
"""
COMMAND = [sys.executable, "-c", LAUNCHER]
TOLERANCE = 1e-4  # sums over shards come in another order


@pytest.fixture(scope="module", params=TRAINERS)
def case(request, run_on, paired_rows, bare_rows):
    """The options of a run, its rows, and what one process makes of them."""
    options = TEMPLATES | TRAINERS[request.param]
    rows = bare_rows if "teacher" in request.param else paired_rows
    return options, rows, run_on(1, rows, **options)


@pytest.fixture
def run_sharded(case, run_on, monkeypatch):
    """`run_sharded(config, sharding)`: the run on two processes, and how far it is from one process's."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))))

    def run(config, sharding):
        options, rows, one = case
        monkeypatch.setenv("SHARDING", sharding)
        two = run_on(2, rows, ["--accelerate_config", config], COMMAND, **options, **SHARDED)
        return greatest_difference(two, one)

    return run


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, run_sharded):
    assert max(run_sharded(f"deepspeed_zero{stage}", "DEEPSPEED").values()) < TOLERANCE


def test_fsdp2(run_sharded):
    assert max(run_sharded("fsdp2", "FSDP").values()) < TOLERANCE
