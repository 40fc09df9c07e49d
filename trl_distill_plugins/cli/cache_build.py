"""`trl-distill cache build` in a worker: the rows of a training config, as the teacher sees them, into a cache."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_distill_plugins.cli.train import option_in, read_config, wants_help
from trl_distill_plugins.cli.train_worker import make_trainer, parse_arguments
from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.losses.base import IGNORE_INDEX
from trl_distill_plugins.prompts.collator import teacher_view
from trl_distill_plugins.teachers.cache.building import fill_cache, unique
from trl_distill_plugins.teachers.cache.documents import Document, documents_of
from trl_distill_plugins.teachers.cache.header import make_header
from trl_distill_plugins.teachers.cache.selection import Samples, Selection, TopK
from trl_distill_plugins.teachers.cache.store import CacheStore
from trl_distill_plugins.teachers.completions import Ranks

COMMAND = "trl-distill cache build"


@dataclass
class CacheArguments:
    """Where the cache goes and what it keeps of a distribution.

    Args:
        cache_dir: the folder; what is in it already is not computed again.
        top_k: the likeliest tokens kept of each position, at most.
        top_mass: fewer are enough if they hold this much of the teacher's mass.
        min_prob: tokens less likely than this are left out.
        samples: keep this many draws of each position in place of the likeliest tokens.
        repair: look for damaged shards first, and build them again.
    """

    cache_dir: str | None = field(default=None, metadata={"help": "Folder of the cache."})
    top_k: int = field(default=64, metadata={"help": "Likeliest tokens kept of each position, at most."})
    top_mass: float = field(default=1.0, metadata={"help": "Fewer are enough if they hold this much of the mass."})
    min_prob: float = field(default=0.0, metadata={"help": "Tokens less likely than this are left out."})
    samples: int | None = field(default=None, metadata={"help": "Keep so many draws in place of the likeliest tokens."})
    repair: bool = field(default=False, metadata={"help": "Look for damaged shards first, and build them again."})

    @property
    def selection(self) -> Selection:
        """Which tokens are kept."""
        return TopK(self.top_k, self.top_mass, self.min_prob) if self.samples is None else Samples(self.samples)


def main(argv: list[str]) -> int:
    """Parse, prepare the rows as training does, ask the teacher, write."""
    folder = option_in(argv, "cache_dir") or read_config(argv).get("cache_dir")
    if not wants_help(argv):
        if not folder:
            raise ConfigError("cache_dir is missing: name the folder of the cache")
        argv = [*argv, "--output_dir", str(folder)]  # for the completions the teacher writes
    arguments, training, model, cache = parse_arguments(argv, CacheArguments, command=COMMAND)
    if arguments.trainer != "sft":
        raise ConfigError("a cache holds what a teacher says of texts that are there before training; set trainer: sft")
    if training.teacher_model_name_or_path is None:
        raise ConfigError(
            "a cache is built from a teacher in memory or on a server; set teacher_model_name_or_path to one"
        )
    if training.teacher_model_name_or_path.startswith("self:"):
        raise ConfigError(
            f"{training.teacher_model_name_or_path} is the student in training; what it says before that is cached by "
            f"its path, teacher_model_name_or_path: {model.model_name_or_path}"
        )
    selection = cache.selection
    # Whatever the losses of the training run are: without one that compares, the teacher would not be loaded.
    training.losses, training.distill_alpha, training.distill_temperature = ["forward_kl"], None, None
    trainer = make_trainer(arguments, training, model)
    return _build(trainer, training, Path(str(folder)), selection, repair=cache.repair)


def _build(trainer: Any, training: Any, folder: Path, selection: Selection, *, repair: bool) -> int:
    accelerator, teacher = trainer.accelerator, trainer.teacher
    _check_teacher(teacher, selection)
    if accelerator.distributed_type in ("DEEPSPEED", "FSDP"):
        raise ConfigError("every process reads other texts, which a sharded teacher cannot; use multi_gpu or multi_cpu")
    header = make_header(
        teacher=str(training.teacher_model_name_or_path),
        model=getattr(teacher, "model", None) or teacher.revision(),
        tokenizer=trainer.processing_class,
        prompt_template=training.teacher_prompt_template,
        selection=selection,
    )
    store = CacheStore.create(folder, header)
    if repair and accelerator.is_main_process:
        store.remove(store.verify())
    accelerator.wait_for_everyone()
    store.refresh()
    teacher.move_to(accelerator.device)
    documents = unique(_documents(trainer))
    fill_cache(
        store,
        teacher,
        documents,
        selection,
        vocabulary=len(trainer.processing_class),
        batch_size=training.per_device_eval_batch_size,
        device=accelerator.device,
        ranks=Ranks(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
    )
    accelerator.print(
        f"{folder} holds {len(store)} texts, with all {len(documents)} of this run; train with "
        f"teacher_model_name_or_path: cache:{folder}"
    )
    return 0


def _check_teacher(teacher: Any, selection: Selection) -> None:
    """Raise `ConfigError` unless the teacher says what is to be kept."""
    if teacher.tokenizer is not None:
        raise ConfigError(
            f"the teacher {teacher} has another tokenizer than the student, and a cache holds log-probabilities of the "
            "student's tokens; train with this teacher in memory"
        )
    if teacher.form != "dense" and isinstance(selection, Samples):
        raise ConfigError("samples are drawn from whole distributions, and this teacher names only some; set top_k")


def _documents(trainer: Any) -> Iterator[Document]:
    """What the teacher will see of the trainer's datasets."""
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    for dataset in (trainer.train_dataset, *evaluated.values()):
        for row in dataset if dataset is not None else ():
            batch = trainer.data_collator([row])
            own = teacher_view(batch) or batch
            yield from documents_of(own, own["labels"][:, 1:] != IGNORE_INDEX)


if __name__ == "__main__":
    from trl_distill_plugins.cli.worker import exit_with, run

    exit_with(run(sys.argv[1:], COMMAND, "trl_distill_plugins.cli.cache_build"))
