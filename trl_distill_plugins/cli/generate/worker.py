"""`trl-distill generate` on each device: read the rows, ask the teacher, write."""

import hashlib
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import set_seed

from trl_distill_plugins.cli.generate.arguments import COMMAND, GenerateArguments, parse
from trl_distill_plugins.cli.generate.asking import Asking, read_prompts
from trl_distill_plugins.cli.generate.dry_run import estimate, show
from trl_distill_plugins.cli.generate.output import Outcome, check_same_run, finish, open_output
from trl_distill_plugins.cli.train_worker import load_any
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.prompts.files import name_of
from trl_distill_plugins.teachers import load_tokenizer, make_teacher
from trl_distill_plugins.teachers.completions import CompletionStore, Ranks, Request, write_completions

MODULE = "trl_distill_plugins.cli.generate.worker"
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
LONGEST_WAIT = timedelta(days=30)  # for other processes, whose completions may be far longer than this one's


def main(argv: list[str]) -> int:
    """Parse, read the rows, and ask the teacher or say what it would take."""
    arguments = parse(argv)
    state = _join(arguments)
    dataset = load_any(
        arguments.dataset_name, arguments.dataset_train_split, arguments.dataset_config, arguments.input_column
    )
    tokenizer = load_tokenizer(*arguments.teacher, trust_remote_code=arguments.trust_remote_code)
    asking = read_prompts(dataset, name_of(dataset, arguments.dataset_train_split), arguments, tokenizer)
    requests = asking.requests(arguments)
    ranks = Ranks(state.process_index, state.num_processes, state.wait_for_everyone)
    if arguments.dry_run:
        if state.is_main_process:
            there = _written(arguments, requests)
            show(estimate(asking, requests, there, arguments, is_exact=tokenizer is not None), as_json=arguments.json)
        return 0
    store = open_output(Path(str(arguments.output_file)), ranks)
    _write(arguments, tokenizer, requests, store, state)
    outcome = finish(store, requests, arguments.generation) if state.is_main_process else None
    state.wait_for_everyone()
    if outcome is not None:
        _report(outcome, asking, arguments)
    return 0


def _join(arguments: GenerateArguments) -> Any:
    """This process among those of the run. Each holds the whole teacher, also where a training config shards models."""
    for variable in SHARDING:
        os.environ.pop(variable, None)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = arguments.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, **({"timeout": LONGEST_WAIT} if several else {}))


def _written(arguments: GenerateArguments, requests: Sequence[Request]) -> dict[str, Any]:
    """The records that the output file, if one is named, holds already. Nothing is made."""
    path = None if arguments.output_file is None else Path(arguments.output_file)
    if path is None or not path.parent.is_dir():
        return {}
    held = open_output(path, Ranks()).read()
    check_same_run(held, path, requests, arguments.generation)
    return held


def _write(
    arguments: GenerateArguments, tokenizer: Any, requests: list[Request], store: CompletionStore, state: Any
) -> None:
    held = store.read()
    check_same_run(held, store.path, requests, arguments.generation)
    if all(request.key in held for request in requests):
        return
    teacher = make_teacher(*arguments.teacher, trust_remote_code=arguments.trust_remote_code)
    if tokenizer is not None:
        teacher.check_student(tokenizer)
    teacher.check_prompt(arguments.teacher_prompt_template)
    teacher.move_to(state.device)
    # No two processes and no two starts draw the same for two completions of one prompt.
    drawn = f"{arguments.seed} {state.process_index} {len(held)}"
    set_seed(int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:4]))
    write_completions(
        requests,
        teacher,
        arguments.generation,
        store,
        batch_size=arguments.generation_batch_size,
        description="Completions",
    )


def _report(outcome: Outcome, asking: Asking, arguments: GenerateArguments) -> None:
    for category, count in asking.categories.items():
        print(f"{arguments.category_column} {category}: {count} of {asking.available[category]} prompts")
    notes = [
        (asking.duplicates, "duplicate rows asked once"),
        (outcome.cut_off, f"cut off at max_new_tokens ({arguments.max_new_tokens})"),
        (outcome.empty, "empty and left out"),
        (outcome.others, "of other rows kept as they were"),
    ]
    listed = ", ".join(f"{count} {text}" for count, text in notes if count)
    path = arguments.output_file
    if not outcome.written:
        raise ConfigError(f"{path}: the teacher completed every row with nothing; check teacher_prompt_template")
    print(
        f"{path} holds {outcome.written} completions of {asking.rows} rows{listed and f' ({listed})'}; train with "
        f"dataset_name: {path}"
    )


if __name__ == "__main__":
    from trl_distill_plugins.cli.worker import exit_with, run

    exit_with(run(sys.argv[1:], COMMAND, MODULE))
