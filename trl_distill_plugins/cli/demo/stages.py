"""The demo from beginning to end: teacher, student, report."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trl_distill_plugins.cli.demo import distill
from trl_distill_plugins.cli.demo.measure import Prompted, accuracy, mean_kl, speedup
from trl_distill_plugins.cli.demo.report import Report
from trl_distill_plugins.cli.demo.task import STUDENT_TEMPLATE, Handbook, chance_accuracy, distinct_tickets
from trl_distill_plugins.cli.demo.teacher import Recipe, prepare_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAIN_INPUTS = 4000
HELD_OUT_INPUTS = 400
TIMED_INPUTS = 128


class Demo:
    """One demo in one folder; started again after an interruption, it goes on with a finished teacher."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = random.Random(seed)
        self.folder, self.seed = folder, seed
        self.console = Console()
        self.seconds: dict[str, float] = {}
        self.handbook = Handbook.sample(rng)
        self.train_tickets = distinct_tickets(TRAIN_INPUTS, rng, held_out=False)
        held_out = distinct_tickets(HELD_OUT_INPUTS, rng, held_out=True)
        self.inputs = [ticket.text for ticket in held_out]
        self.right = [self.handbook.answer(ticket.topic) for ticket in held_out]

    def run(self) -> Report:
        """Make or reuse the teacher, distil the student, measure both, and show and save the report."""
        _quiet()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._explain()
        with self._stage("teacher", "1/3  A teacher learns to read handbooks"):
            self._teach()
        with self._stage("distillation", "2/3  trl-distill train moves one handbook into a student"):
            self._distil()
        with self._stage("evaluation", "3/3  Both answer tickets that nobody was trained on"):
            report = self._measure()
        self._show(report)
        return report

    @contextmanager
    def _stage(self, name: str, title: str) -> Iterator[None]:
        self.console.rule(f"[bold]{title}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)

    def _explain(self) -> None:
        self.console.print(f"[bold]prompt[/]  {self.handbook.text()[:300]} ...", highlight=False)
        self.console.print(f"[bold]ticket[/]  {self.inputs[0]}", highlight=False)
        self.console.print(f"[bold]answer[/]  {self.right[0]}", highlight=False)

    def _teach(self) -> None:
        if prepare_teacher(self.folder / "teacher", Recipe(seed=self.seed)):
            distill.forget_student(self.folder)
        else:
            self.console.print("found a finished teacher of the same recipe and seed")

    def _distil(self) -> None:
        distill.write_student(self.folder / "student_init", self.seed)
        distill.write_inputs(self.folder / "train.jsonl", self.train_tickets)
        distill.train_student(distill.write_config(self.folder, self.handbook, self.seed))

    def _measure(self) -> Report:
        long = self._load("teacher", self.handbook.teacher_template())
        bare = Prompted(long.model, long.tokenizer, STUDENT_TEMPLATE)
        before = self._load("student_init", STUDENT_TEMPLATE)
        after = self._load("student", STUDENT_TEMPLATE)
        return Report(
            teacher_accuracy=self._accuracy(long),
            teacher_accuracy_without_prompt=self._accuracy(bare),
            student_accuracy_before=self._accuracy(before),
            student_accuracy_after=self._accuracy(after),
            chance_accuracy=chance_accuracy(self.right),
            kl_before=mean_kl(long, before, self.inputs, self.right),
            kl_after=mean_kl(long, after, self.inputs, self.right),
            prompt_tokens_teacher=long.prompt_tokens(self.inputs),
            prompt_tokens_student=after.prompt_tokens(self.inputs),
            speedup=speedup(long, after, self.inputs[:TIMED_INPUTS], max_new_tokens=distill.MAX_NEW_TOKENS),
            held_out_inputs=len(self.inputs),
            train_inputs=len(self.train_tickets),
            teacher_parameters=_parameters(long.model),
            student_parameters=_parameters(after.model),
            seed=self.seed,
            seconds=self.seconds,
        )

    def _load(self, name: str, template: str) -> Prompted:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = self.folder / name
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        return Prompted(model, AutoTokenizer.from_pretrained(path), template)

    def _accuracy(self, side: Prompted) -> float:
        return accuracy(side.answers(self.inputs, max_new_tokens=distill.MAX_NEW_TOKENS), self.right)

    def _show(self, report: Report) -> None:
        report.write_json(self.folder / "report.json")
        report.write_png(self.folder / "report.png")
        self.console.print(report.table())
        self.console.print(f"[bold]{report.verdict()}[/]", highlight=False)
        took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        self.console.print(f"[dim]{took}; report.json, report.png and distill.yaml are in {self.folder}[/]")


def _quiet() -> None:
    """Keep progress bars of loading and saving small models out of the demo."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _parameters(model: "PreTrainedModel") -> int:
    return sum(parameter.numel() for parameter in model.parameters())
