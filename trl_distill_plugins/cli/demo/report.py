"""The demo's result as people and programs read it: a terminal table, a figure, a JSON file."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trl_distill_plugins.cli.demo import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

TEACHER, STUDENT, GREY, INK = "#3b6fb6", "#e0792b", "#c3c8cf", "#2b2f36"


@dataclass(frozen=True)
class Report:
    """Everything the demo measured, on inputs that nobody was trained on; KL in nats a token."""

    teacher_accuracy: float
    teacher_accuracy_without_prompt: float
    student_accuracy_before: float
    student_accuracy_after: float
    chance_accuracy: float
    kl_before: float
    kl_after: float
    prompt_tokens_teacher: float
    prompt_tokens_student: float
    speedup: float
    held_out_inputs: int
    train_inputs: int
    teacher_parameters: int
    student_parameters: int
    seed: int
    seconds: dict[str, float]

    @property
    def retained(self) -> float:
        """The student's accuracy as a share of the teacher's."""
        return self.student_accuracy_after / self.teacher_accuracy if self.teacher_accuracy else 0.0

    def write_json(self, path: Path) -> None:
        """Write the report to `path`; it appears whole or not at all."""
        files.write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    def table(self) -> "Table":
        """Return the table for the terminal."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, title=f"{self.held_out_inputs} held-out tickets", title_style="bold")
        for heading in ("", "prompt", "parameters", "accuracy", "KL to teacher"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        long, short = f"{self.prompt_tokens_teacher:.0f} tokens", f"{self.prompt_tokens_student:.0f} tokens"
        big, small = f"{self.teacher_parameters:,}", f"{self.student_parameters:,}"
        table.add_row("teacher with handbook", long, big, f"[bold]{self.teacher_accuracy:.1%}[/]", "0")
        table.add_row("teacher without it", short, big, f"{self.teacher_accuracy_without_prompt:.1%}", "")
        table.add_row("student before", short, small, f"{self.student_accuracy_before:.1%}", f"{self.kl_before:.3f}")
        after = f"[bold green]{self.student_accuracy_after:.1%}[/]"
        table.add_row("[bold]student distilled[/]", short, small, after, f"{self.kl_after:.3f}")
        table.add_row("[dim]best constant answer[/]", "", "", f"[dim]{self.chance_accuracy:.1%}[/]", "")
        return table

    def verdict(self) -> str:
        """Return the result in one sentence."""
        shorter = self.prompt_tokens_teacher / self.prompt_tokens_student
        return (
            f"The student keeps {self.retained:.0%} of the teacher's accuracy with a {shorter:.0f}x shorter prompt, "
            f"{self.speedup:.1f}x faster."
        )

    def write_png(self, path: Path) -> None:
        """Draw accuracy, prompt length and speed side by side."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.8), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, 3, width_ratios=(3, 1.25, 1.25), left=0.06, right=0.98, top=0.74, bottom=0.15)
        figure.subplots_adjust(wspace=0.3)
        figure.text(0.06, 0.93, "The prompt moved into the weights", fontsize=17, weight="bold", color=INK)
        figure.text(0.06, 0.865, self.verdict(), fontsize=11, color=INK)
        self._draw_accuracy(figure.add_subplot(grid[0]))
        tokens = (self.prompt_tokens_teacher, self.prompt_tokens_student)
        _draw_pair(figure.add_subplot(grid[1]), "Prompt tokens a ticket", tokens, "{:.0f}")
        _draw_pair(figure.add_subplot(grid[2]), "Answers in the same time", (1.0, self.speedup), "{:.1f}x")
        figure.savefig(path.with_suffix(".tmp"), format="png")
        os.replace(path.with_suffix(".tmp"), path)

    def _draw_accuracy(self, axes: "Axes") -> None:
        names = ["teacher\nwith handbook", "teacher\nwithout", "student\nbefore", "student\ndistilled"]
        heights = [
            self.teacher_accuracy,
            self.teacher_accuracy_without_prompt,
            self.student_accuracy_before,
            self.student_accuracy_after,
        ]
        axes.bar(names, heights, color=[TEACHER, GREY, GREY, STUDENT], width=0.62, zorder=2)
        for column, height in enumerate(heights):
            above = max(height, self.chance_accuracy) + 0.02  # low bars carry their label above the chance line
            axes.text(column, above, f"{height:.1%}", ha="center", color=INK, weight="bold")
        axes.axhline(self.chance_accuracy, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        chance = f"- - -  best constant answer {self.chance_accuracy:.1%}"
        axes.text(1.5, self.chance_accuracy + 0.12, chance, fontsize=9, color=INK, ha="center")
        axes.set_ylim(0, 1.12)
        _tidy(axes, f"Exact answers on {self.held_out_inputs} held-out tickets")


def _draw_pair(axes: "Axes", title: str, heights: tuple[float, float], label: str) -> None:
    bars = axes.bar(["teacher", "student"], heights, color=[TEACHER, STUDENT], width=0.62)
    axes.bar_label(bars, [label.format(height) for height in heights], padding=3, color=INK, weight="bold")
    axes.set_ylim(0, max(heights) * 1.14)
    _tidy(axes, title)


def _tidy(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="both", length=0, labelsize=9.5, colors=INK)
    axes.set_yticks([])
