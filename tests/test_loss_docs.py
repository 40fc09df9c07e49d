"""docs/losses.md says what the losses are: every one has a section, with its options as they are, and its plot."""

import importlib.util
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from trl_distill_plugins.losses.objective import Objective
from trl_distill_plugins.losses.schedules import parse_schedule
from trl_distill_plugins.plugins import get_loss_class

DOCS = Path(__file__).parent.parent / "docs"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


draw_losses = load_script(DOCS / "draw_losses.py")
LOSSES = draw_losses.token_losses()
TEXT = (DOCS / "losses.md").read_text()
PARTS = re.split(r"^(?:### `(\w+)`|## .*)$", TEXT, flags=re.M)
SECTIONS = {name: text for name, text in zip(PARTS[1::2], PARTS[2::2], strict=True) if name}


def documented_options(section):
    """Names and defaults of the table in a section; a row may hold several."""
    options = {}
    for names, defaults in re.findall(r"^\| (`.*?) \| (`.*?) \|", section, re.M):
        values = [yaml.safe_load(value) for value in re.findall(r"`([^`]+)`", defaults)]
        options |= dict(zip(re.findall(r"`([^`]+)`", names), values, strict=True))
    return {name: parse_schedule(name, value) for name, value in options.items()}


def test_every_built_in_loss_has_a_section():
    assert sorted(SECTIONS) == sorted(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_options_and_defaults_are_the_documented_ones(name):
    options = {field.name: field.default for field in fields(get_loss_class(name).Options)}
    assert MISSING not in options.values()
    assert documented_options(SECTIONS[name]) == options


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_reads_is_documented(name):
    cls = get_loss_class(name)
    teacher = ", ".join(cls.teacher_forms) if cls.needs_teacher else "none"
    assert f"\nTeacher: {teacher}. Labels: {'yes' if cls.needs_labels else 'no'}.\n" in SECTIONS[name]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_plot(name):
    assert f"\n![{name}](losses/{name}.svg)\n" in SECTIONS[name]
    assert 0 < (DOCS / "losses" / f"{name}.svg").stat().st_size < 40_000


def test_no_plot_is_of_no_loss():
    assert sorted(path.stem for path in (DOCS / "losses").iterdir()) == sorted(LOSSES)


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```", TEXT, re.S | re.M))
def test_configs_are_objectives(block):
    losses = yaml.safe_load(block)["losses"]
    assert [term.loss.name for term in Objective.from_config(losses).terms] == [entry["name"] for entry in losses]


def test_forward_kl_covers_both_modes():
    (end,) = draw_losses.fit("forward_kl")
    assert 85 < end.mean < 105
    assert end.width > 25


def test_reverse_kl_sits_on_the_larger_mode():
    best, *others = draw_losses.fit("reverse_kl")
    assert abs(best.mean - 70) < 1
    assert best.width < 12
    assert any(abs(end.mean - 130) < 1 for end in others), "from a start there it stays on the smaller one"


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_plot_drawn_anew_says_the_same(name, tmp_path):
    drawn = draw_losses.write(name, tmp_path).read_text()
    assert figures(drawn) == pytest.approx(figures((DOCS / "losses" / f"{name}.svg").read_text()), abs=0.2)


def figures(svg):
    """Mean and width of every student of a plot."""
    (description,) = re.findall(r"<dc:description>(.*?)</dc:description>", svg, re.S)
    return [float(number) for number in re.findall(r"(?:mean|width) ([\d.]+)", description)]


def test_the_same_fit_is_drawn_to_the_same_bytes(tmp_path):
    first = draw_losses.write("total_variation", tmp_path).read_bytes()
    assert draw_losses.write("total_variation", tmp_path).read_bytes() == first
