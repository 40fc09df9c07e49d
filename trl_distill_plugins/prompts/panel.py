"""The prompts of several teachers, who read each row together or take turns.

Where they have prompts of their own, the teacher's view of a row is what each of its readers sees, laid end to end:
`teacher_input_ids`, `teacher_labels` and, for each token, whose it is in `teacher_members`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from trl_distill_plugins.errors import DataError, did_you_mean
from trl_distill_plugins.prompts.rows import Prompt, SourceRow
from trl_distill_plugins.prompts.templates import PromptTemplate

MEMBERS = "members"
MEMBERS_COLUMN = "teacher_members"


@dataclass(frozen=True)
class PanelTemplates:
    """Who reads a row, with what prompt.

    Args:
        templates: of each teacher; None where it sees the row's own prompt.
        names: of each teacher, as the column has them; empty where all read every row.
        column: names the teacher of a row; None where all read every row.
    """

    templates: tuple[PromptTemplate | None, ...]
    names: tuple[str, ...] = ()
    column: str | None = None

    def prompts(self, source: SourceRow) -> list[tuple[int, Prompt]]:
        """The readers of a row, by number, each with its prompt. Raise `DataError` if the row names none of them."""
        prompts = []
        for reader in self._readers(source):
            template = self.templates[reader]
            prompts.append((reader, source.own_prompt() if template is None else template.render(source)))
        return prompts

    def _readers(self, source: SourceRow) -> list[int]:
        if self.column is None:
            return list(range(len(self.templates)))
        name = source.field_text(self.column, "the routed teacher")
        if name not in self.names:
            hint = did_you_mean(name, self.names) or "."
            raise DataError(
                f"{source.where}: column {self.column!r} names the teacher {name!r}, which is none of them{hint} "
                f"Teachers: {', '.join(self.names)}"
            )
        return [self.names.index(name)]


def run_lengths(members: Sequence[int]) -> list[int]:
    """The lengths of the documents in a row of `members`: runs of the same one."""
    return [len(list(run)) for _, run in groupby(members)]
