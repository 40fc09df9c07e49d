"""What a distilling trainer does to its datasets: completions for rows without one, then aligned views."""

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import pack_dataset

from trl_distill_plugins.errors import ConfigError
from trl_distill_plugins.prompts.collator import SEQ_LENGTHS
from trl_distill_plugins.prompts.files import name_of
from trl_distill_plugins.prompts.packing import pack_views
from trl_distill_plugins.prompts.preparing import WHOLE, prepare_views
from trl_distill_plugins.prompts.rows import CONVERSATION_COLUMNS, SourceRow
from trl_distill_plugins.prompts.views import ViewBuilder
from trl_distill_plugins.prompts.weights import weights_in
from trl_distill_plugins.teachers.base import Generation, Teacher, TeacherPrompt
from trl_distill_plugins.teachers.completions import (
    FILE_NAME,
    CompletionStore,
    Ranks,
    make_request,
    write_completions,
)
from trl_distill_plugins.teachers.several import Panel
from trl_distill_plugins.trainers import trl_compat

logger = logging.getLogger(__name__)


class ViewPreparation:
    """Prepares the datasets of one trainer.

    A row without a completion gets one from the teacher, generated under the teacher's own prompt and kept in
    OUTPUT_DIR/teacher_completions.jsonl; the same command resumes there. Rows the student completes itself
    (on-policy training) stay prompts.

    Args:
        args: the trainer's arguments.
        tokenizer: the student's.
        teacher: None where there is no teacher; rows must then bring their completions.
        accelerator: the trainer's.
        teacher_reads: whether the teacher reads the prepared rows; it may only write completions.
        student_completes: whether training rows may stay without a completion.
    """

    def __init__(
        self,
        args: Any,
        tokenizer: Any,
        teacher: Teacher | None,
        accelerator: Any,
        *,
        teacher_reads: bool,
        student_completes: bool,
    ) -> None:
        self.args, self.tokenizer, self.teacher, self.accelerator = args, tokenizer, teacher, accelerator
        self.teacher_reads, self.student_completes = teacher_reads, student_completes

    @staticmethod
    def needed(args: Any, datasets: Iterable[Any], has_teacher: bool) -> bool:
        """Whether the rows want more than TRL's own preparation: templates, completions they lack, completions that may
        have been cut off, which TRL would end with an end token, or token weights."""
        templates = (args.student_prompt_template, args.teacher_prompt_template, args.input_column)
        return any(templates) or any(
            _lacks_completions(part, args.dataset_text_field, has_teacher) or _may_be_cut_off(part) or weights_in(part)
            for part in _parts(datasets)
            if part
        )

    @staticmethod
    def all_complete(datasets: Iterable[Any]) -> bool:
        """Whether every row is known to bring its completion."""
        return all(
            isinstance(part, Dataset)
            and "completion" in part.column_names
            and part.data.column("completion").null_count == 0
            for part in _parts(datasets)
            if part is not None
        )

    def __call__(self, dataset: Any, name: str, *, packing: bool) -> Any:
        """Return `dataset` as rows of token ids: `input_ids`, `labels` and, with two prompts, the teacher's.

        What was prepared before, packed or not, is returned as it is, but shuffled."""
        keeps_prompts = self.student_completes and name == "train"
        name = name_of(dataset, name)
        builder = self._builder(completion_required=not keeps_prompts)
        if isinstance(dataset, Dataset) and "input_ids" not in dataset.column_names and not keeps_prompts:
            dataset = self._completed(dataset, builder, name)
        with self.accelerator.main_process_first():
            cut = WHOLE if packing else _cut_of_trl(self.args)
            views = prepare_views(dataset, builder, name, num_proc=self.args.dataset_num_proc, cut=cut)
        if packing and SEQ_LENGTHS not in (views.column_names or next(iter(views))):
            strategy = self.args.packing_strategy
            views = pack_views(views, lambda rows, length: pack_dataset(rows, length, strategy), self.args.max_length)
        return views.shuffle(seed=self.args.seed) if self.args.shuffle_dataset else views

    def _builder(self, *, completion_required: bool) -> ViewBuilder:
        args = self.args
        student_template = args.template("student")
        teacher_template = student_template
        if self.teacher is not None:
            teacher_template = self.teacher.prompts(args.template("teacher"))
        return ViewBuilder(
            self.tokenizer,
            teacher_tokenizer=None if self.teacher is None else self.teacher.tokenizer,
            student_template=student_template,
            teacher_template=teacher_template,
            max_length=args.max_length,
            max_teacher_length=args.max_teacher_length,
            teacher_reads=self.teacher_reads,
            input_column=args.input_column,
            completion_required=completion_required,
        )

    def _completed(self, dataset: Dataset, builder: ViewBuilder, name: str) -> Dataset:
        """The dataset with a completion in each row; rows the teacher has nothing to say to are left out."""
        rows = [
            index for index, row in enumerate(dataset) if not builder.has_completion(row, f"{name}, row {index + 1}")
        ]
        if not rows:
            return dataset
        if self.teacher is None:
            raise ConfigError(
                f"{name}: {len(rows)} of {len(dataset)} rows have no completion, the first is row {rows[0] + 1}; set "
                "teacher_model_name_or_path to have them written, or fill in the column 'completion'"
            )
        records = self._write(self.teacher, dataset, rows, builder, name)
        return _with_completions(dataset, dict(zip(rows, records, strict=True)), name)

    def _write(
        self, teacher: Teacher, dataset: Dataset, rows: list[int], builder: ViewBuilder, name: str
    ) -> list[dict[str, Any]]:
        args = self.args
        generation = Generation(args.max_new_tokens, getattr(args, "generation_temperature", 0.0))
        repeats: Counter[tuple[int, ...]] = Counter()
        requests = []
        for index in rows:
            row = dataset[index]
            prompt = TeacherPrompt(*builder.teacher_prompt(row, f"{name}, row {index + 1}"))
            # Sampling gives equal prompts completions of their own; the most likely one is the same each time.
            ids = tuple(prompt.token_ids)
            repeat = repeats[ids] if generation.temperature > 0 else 0
            repeats[ids] += 1
            shown = SourceRow(row, name, args.input_column).own_prompt()
            requests.append(make_request(prompt, {"prompt": shown}, self._writer(teacher, prompt), generation, repeat))
        accelerator = self.accelerator
        ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        store = CompletionStore(Path(args.output_dir, FILE_NAME), ranks)
        teacher.move_to(accelerator.device)
        with trl_compat.whole_model(getattr(teacher, "model", None)):
            return write_completions(
                requests,
                teacher,
                generation,
                store,
                batch_size=getattr(args, "generation_batch_size", args.per_device_eval_batch_size),
                description=f"Teacher completions for {name}",
            )

    def _writer(self, teacher: Teacher, prompt: TeacherPrompt) -> str:
        """The name of who completes a prompt."""
        if isinstance(teacher, Panel):  # its own name does not say of whom it consists
            return str(teacher.members[prompt.member].teacher)
        return str(self.args.teacher_model_name_or_path or type(teacher).__name__)


def _parts(datasets: Iterable[Any]) -> list[Any]:
    """The datasets, those of a dict one by one."""
    return [part for data in datasets for part in (data.values() if isinstance(data, dict) else [data])]


def _lacks_completions(dataset: Any, text_field: str, has_teacher: bool) -> bool:
    first = next(iter(dataset), None)
    if first is None or "input_ids" in first or text_field in first:
        return False
    if "completion" in first:
        return isinstance(dataset, Dataset) and dataset.data.column("completion").null_count > 0
    if any(column in first for column in CONVERSATION_COLUMNS):
        # Without a teacher, a conversation that does not end with an answer is text to train on, as in TRL.
        return has_teacher and SourceRow(first, "row 1").completion() is None
    return "prompt" in first or "input" in first


def _cut_of_trl(args: Any) -> slice:
    """What TRL keeps of a tokenised row."""
    if args.max_length is None:
        return WHOLE
    return slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)


def _may_be_cut_off(dataset: Any) -> bool:
    return "completion_truncated" in next(iter(dataset), {})


def _with_completions(dataset: Dataset, records: dict[int, dict[str, Any]], name: str) -> Dataset:
    """Fill `records` in as completions, by row index."""
    empty = [index for index, record in records.items() if not record["completion"]]
    if empty:
        logger.warning(
            "%s: the teacher's completion is empty for %d of %d rows, the first is row %d; they are left out",
            name, len(empty), len(dataset), empty[0] + 1,
        )  # fmt: skip
    if len(empty) == len(dataset):
        raise ConfigError(f"{name}: the teacher completed every row with nothing; check teacher_prompt_template")
    given = dataset["completion"] if "completion" in dataset.column_names else [None] * len(dataset)
    texts = [records[i]["completion"] if i in records else own for i, own in enumerate(given)]
    cut_off = [i in records and records[i]["finish_reason"] == "length" for i in range(len(dataset))]
    if any(isinstance(own, list) for own in given):
        texts = [[{"role": "assistant", "content": t}] if isinstance(t, str) else t for t in texts]
    base = dataset.remove_columns([c for c in ("completion", "completion_truncated") if c in dataset.column_names])
    full = base.add_column("completion", texts).add_column("completion_truncated", cut_off)
    left_out = set(empty)
    return full.select([i for i in range(len(dataset)) if i not in left_out])
