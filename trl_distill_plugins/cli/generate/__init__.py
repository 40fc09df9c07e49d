"""`trl-distill generate`: have a teacher write completions for a dataset, to a JSONL file that `train` takes.

arguments.py   the options
asking.py      rows -> the prompts to ask: duplicates out, so many of each category
dry_run.py     what it would take: tokens and cost
output.py      the file: whose completions it may hold, and its final order
worker.py      the run itself, on each device
"""


def run(argv: list[str]) -> int:
    """Generate; return the exit code of the workers."""
    from trl_distill_plugins.cli.train import run_workers

    worker = "trl_distill_plugins.cli.generate.worker"
    return run_workers(worker, worker, argv)
