"""One of several teachers, as a config spells it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_distill_plugins.errors import TeacherError, did_you_mean
from trl_distill_plugins.losses.checks import check_range
from trl_distill_plugins.prompts.templates import PromptTemplate
from trl_distill_plugins.teachers import make_teacher
from trl_distill_plugins.teachers.base import Teacher

_KEYS = ("teacher", "weight", "prompt_template", "init_kwargs")


@dataclass(frozen=True)
class Member:
    """A teacher among others.

    Args:
        name: what messages call it, and a column that routes to it.
        teacher: it.
        weight: its weight in a mixture, above 0.
        template: its own prompt template, if `has_template`.
        has_template: False where it sees what `teacher_prompt_template` says.
    """

    name: str
    teacher: Teacher
    weight: float
    template: PromptTemplate | None
    has_template: bool

    def prompt(self, default: PromptTemplate | None) -> PromptTemplate | None:
        """What this teacher's prompts are made by."""
        return self.template if self.has_template else default


def parse_members(
    kind: str, specs: Sequence[tuple[Any, Any]], unknown: dict[str, Any], *, weighted: bool = True
) -> list[Member]:
    """The teachers in `specs`, pairs of name and spec. `unknown` are options nobody takes; `weighted` says whether a
    spec may have a weight.

    Raises:
        TeacherError: there are fewer than two, a spec is malformed, or a teacher cannot be loaded.
    """
    if unknown:
        raise TeacherError(f"the teacher {kind!r} takes the option teachers, not {', '.join(unknown)}")
    if len(specs) < 2:
        raise TeacherError(f"the teacher {kind!r} needs two teachers or more; list them in its option teachers")
    keys = [key for key in _KEYS if weighted or key != "weight"]
    return [_member(str(name), spec, f"teachers[{name}]", keys) for name, spec in specs]


def _member(name: str, spec: Any, where: str, keys: Sequence[str]) -> Member:
    options = dict(spec) if isinstance(spec, dict) else {"teacher": spec}
    for key in options:
        if key not in keys:
            hint = did_you_mean(key, keys) or "."
            raise TeacherError(f"{where}: no option {key!r}{hint} Options: {', '.join(keys)}")
    if options.get("teacher") is None:
        raise TeacherError(f"{where}: teacher is missing: a path, a hub name, or scheme:address of a teacher plugin")
    init_kwargs = options.get("init_kwargs")
    if not isinstance(init_kwargs, dict | None):
        raise TeacherError(f"{where}: init_kwargs are a mapping, e.g. {{dtype: bfloat16}}, not {init_kwargs!r}")
    weight = options.get("weight", 1.0)
    check_range(f"{where}: weight", weight, above=0.0)
    return Member(
        name,
        make_teacher(options["teacher"], init_kwargs),
        float(weight),
        PromptTemplate.parse(options.get("prompt_template"), f"{where}: prompt_template"),
        "prompt_template" in options,
    )
