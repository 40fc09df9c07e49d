"""Draws docs/losses/NAME.svg: what each built-in loss makes of a student that is too small for its teacher.

The vocabulary is 200 tokens in a row. The teacher has two modes; the student is one bell, with a mean and a width as
its only parameters, fitted by gradient descent on the loss, the expectation over the labels taken exactly. It starts
from four places. The end with the least loss is drawn as a line, other ends it got stuck in are dashed.

    python docs/draw_losses.py [NAME ...]
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trl_distill_plugins import get_loss
from trl_distill_plugins.losses.base import Loss
from trl_distill_plugins.losses.tiles import LogitsTile, TeacherTile
from trl_distill_plugins.plugins import installed

FOLDER = Path(__file__).parent / "losses"
STEPS = 400
TOKENS = torch.arange(200, dtype=torch.float64)
STARTS = ((60.0, 15.0), (100.0, 15.0), (140.0, 15.0), (100.0, 60.0))  # mean and width, in tokens
LINES = (("#0072b2", 4.5), ("#e69f00", 2.6), ("#000000", 1.1))  # colour and width: equal curves show one in the other
STYLE = {
    "svg.hashsalt": "losses",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
}


def bell(mean: Tensor | float, width: Tensor | float) -> Tensor:
    """Logits of a bell over the tokens."""
    return -0.5 * ((TOKENS - mean) / width) ** 2


# A thousandth of the mass lies evenly on all tokens: as with a language model, none is impossible.
TEACHER = 0.999 * (0.6 * bell(70, 10).softmax(-1) + 0.4 * bell(130, 8).softmax(-1)) + 0.001 / len(TOKENS)


@dataclass(frozen=True)
class Case:
    """One student of a plot.

    Args:
        label: its line in the legend.
        options: of the loss.
        own: the share of the tokens the student wrote itself.
        stop: the share of training after which it is drawn.
        starts: mean and width at the start of each descent.
    """

    label: str = "student"
    options: dict[str, Any] = field(default_factory=dict)
    own: float = 0.0
    stop: float = 1.0
    starts: tuple[tuple[float, float], ...] = STARTS


@dataclass(frozen=True, order=True)
class End:
    """Where a descent ended: the loss there, the mean and the width."""

    loss: float
    mean: float
    width: float


def over(option: str, *values: float) -> list[Case]:
    """A case for each value of an option."""
    return [Case(f"{option} = {value:g}", {option: value}) for value in values]


# What is not listed is drawn with its default options.
CASES = {
    "cross_entropy": over("label_smoothing", 0.0, 0.2),
    "jsd": over("beta", 0.1, 0.5, 0.9),
    "skew_kl": over("lam", 0.1, 0.5, 0.9),
    "skew_reverse_kl": over("lam", 0.1, 0.5, 0.9),
    "contrastive": [
        Case("no token its own"),
        Case("half of the tokens its own", own=0.5),
        Case("all tokens its own", own=1.0),
    ],
    "symmetric_kl": over("ratio", 0.01, 0.1, 0.5),
    "adaptive_kl": over("mu", 0.3, 0.5, 0.9),
    "alpha_beta": [
        Case(f"alpha = {a:g}, beta = {b:g}", {"alpha": a, "beta": b}) for a, b in ((0.2, 0.7), (0.5, 0.5), (1.0, 1.0))
    ],
    "taid": [Case(f"after {stop:.0%} of training", stop=stop, starts=STARTS[:1]) for stop in (0.1, 0.5, 1.0)],
    "decoupled_kd": [Case("alpha = 1, beta = 0.5"), Case("alpha = 1, beta = 0", {"beta": 0.0})],
}


def token_losses() -> list[str]:
    """The names of the built-in losses that compare distributions of tokens."""
    records = [record for record in installed("losses") if record.owner.is_builtin]
    return [record.name for record in records if issubclass(record.cls, Loss)]


def expected_loss(loss: Loss, student: Tensor, own: float = 0.0) -> Tensor:
    """The mean loss of each student, `[n]`, from logits `[n, V]`: over the labels the teacher draws, and over tokens of
    which the student wrote the share `own`."""
    teacher = TEACHER.log().expand_as(student)
    if loss.needs_labels:
        labels = torch.arange(len(TOKENS)).expand(student.shape)
        each = [logits.unsqueeze(1).expand(*student.shape, -1) for logits in (student, teacher)]
        return loss(*each, labels) @ TEACHER
    if own == 0:
        return loss(student, teacher)
    nobody, wrote = torch.zeros(len(student), dtype=torch.long), torch.ones(len(student), dtype=torch.bool)
    tiles = [LogitsTile(student, TeacherTile(teacher), nobody, on_policy) for on_policy in (wrote, ~wrote)]
    return own * loss.per_token(tiles[0]) + (1 - own) * loss.per_token(tiles[1])


def fit(name: str, case: Case = Case()) -> list[End]:
    """Descend from each start of the case, all at once; return the different ends, the least loss first."""
    loss = get_loss(name, **case.options)
    starts = torch.tensor(case.starts, dtype=torch.float64)
    mean, log_width = starts[:, 0].clone().requires_grad_(), starts[:, 1].log().requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [mean], "lr": 0.5}, {"params": [log_width], "lr": 0.04}], betas=(0.9, 0.95)
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(round(case.stop * STEPS)):
        values = expected_loss(loss.at(step / STEPS), bell(mean.unsqueeze(1), log_width.exp().unsqueeze(1)), case.own)
        optimizer.zero_grad()
        values.sum().backward()
        optimizer.step()
        decay.step()
        loss.advance(values.mean().item(), (step + 1) / STEPS)
    ends = sorted(map(End, values.tolist(), mean.tolist(), log_width.exp().tolist()))
    return [end for i, end in enumerate(ends) if not any(_is_same(end, other) for other in ends[:i])]


def _is_same(one: End, other: End) -> bool:
    return abs(one.mean - other.mean) < 2 and abs(one.width - other.width) < 2


def fits_of(name: str) -> list[tuple[Case, list[End]]]:
    """The cases of a loss and where they end."""
    return [(case, fit(name, case)) for case in CASES.get(name, [Case()])]


def describe(fits: Iterable[tuple[Case, list[End]]]) -> str:
    """One line a student: `beta = 0.5: mean 92.6, width 30.5`."""
    return "\n".join(f"{case.label}: {_figures(ends[0])}" for case, ends in fits)


def _figures(end: End) -> str:
    return f"mean {end.mean:.1f}, width {end.width:.1f}"


def draw(name: str, fits: list[tuple[Case, list[End]]]) -> Figure:
    """The plot of one loss. All have the same axes."""
    figure = Figure(figsize=(7.6, 2.7), facecolor="white")
    axes = figure.add_axes((0.075, 0.17, 0.60, 0.72))
    axes.fill_between(TOKENS, TEACHER, color="#d4d4d4", linewidth=0, label="teacher")
    for (case, ends), (color, width) in zip(fits, LINES if len(fits) > 1 else [(LINES[0][0], 2)], strict=False):
        axes.plot(TOKENS, _curve(ends[0]), color=color, linewidth=width, label=f"{case.label}\n{_figures(ends[0])}")
        for end in ends[1:]:
            axes.plot(TOKENS, _curve(end), color=color, linewidth=1, linestyle=(0, (3, 2)), alpha=0.7)
    if any(len(ends) > 1 for _, ends in fits):
        axes.plot([], [], color="#777777", linewidth=1, linestyle=(0, (3, 2)), label="ends of other starts")
    axes.set(xlim=(0, 199), ylim=(0, 0.055), xlabel="token", ylabel="probability")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, loc="left", fontweight="bold")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.04), frameon=False, fontsize=8.5, labelspacing=0.9)
    return figure


def _curve(end: End) -> Tensor:
    """The student's probabilities, rounded so that the last bits of a fit do not change the file."""
    return bell(round(end.mean, 1), round(end.width, 1)).softmax(-1)


def write(name: str, folder: Path = FOLDER) -> Path:
    """Fit, draw and write one loss; the figures are in the file's description, too."""
    fits, path = fits_of(name), folder / f"{name}.svg"
    with matplotlib.rc_context(STYLE):
        metadata = {"Title": name, "Description": describe(fits), "Date": None, "Creator": None}
        draw(name, fits).savefig(path, metadata=metadata)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what each loss does to a student too small for its teacher.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="losses to draw; all built-in ones by default")
    FOLDER.mkdir(exist_ok=True)
    for name in parser.parse_args().names or token_losses():
        path = write(name)
        print(f"{path.relative_to(FOLDER.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
