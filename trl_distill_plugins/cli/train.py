"""`trl-distill train`: hand the arguments to accelerate, which starts one worker a device."""

from trl_distill_plugins.cli.launch import launch, resolve_launch_args

WORKER = "trl_distill_plugins.cli.train_worker"


def run(argv: list[str]) -> int:
    """Train; return the exit code of the workers."""
    if "-h" in argv or "--help" in argv:
        from trl_distill_plugins.cli.train_worker import main

        return main(argv)
    accelerate_args, train_args = resolve_launch_args(argv)
    return launch(WORKER, accelerate_args, train_args)
