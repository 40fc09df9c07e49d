"""`trl-distill demo`: a teacher that needs a long prompt, a student distilled to do without it, and a report.

Everything is made here, offline: the data, the teacher, the student. The distillation itself is an ordinary
`trl-distill train --config`, whose YAML and JSONL stay in the output folder to be looked at and run again.
"""

import argparse
import os
from pathlib import Path


def run(argv: list[str]) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(prog="trl-distill demo", description="Distil a long prompt into a small model.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another company with other tickets")
    arguments = parser.parse_args(argv)

    # Models this small spend their time in short parallel sections. OpenMP threads that spin between them cost
    # six times the wall time on two cores as soon as anything else runs. It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trl_distill_plugins.cli.demo.stages import Demo

    Demo(arguments.output_dir, arguments.seed).run()
    return 0
