"""A row with weights to two aligned views and what each of the student's tokens weighs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl_distill_plugins.errors import DataError
from trl_distill_plugins.prompts.encoding import Encoder
from trl_distill_plugins.prompts.message_weights import token_weights
from trl_distill_plugins.prompts.panel import PanelTemplates
from trl_distill_plugins.prompts.rows import Completion, Prompt, SourceRow
from trl_distill_plugins.prompts.truncation import cut_alike
from trl_distill_plugins.prompts.views import ViewBuilder, prompt_of
from trl_distill_plugins.prompts.weights import IGNORE_INDEX, STAYS, WEIGHT, WEIGHTS_COLUMN, masked, masked_alike


class WeightedViews:
    """Turns a row into a prepared row with `loss_weights`, as `ViewBuilder` into one without. Picklable.

    The weights are those of the student's tokens, 0 where the label is -100, and cut as these are. Where a message of
    the row's own prompt has a weight above 0, its tokens are trained, too. A column `stays` is False where no token is.
    """

    def __init__(self, builder: ViewBuilder) -> None:
        self.builder = builder

    def __call__(self, row: Mapping[str, Any], index: int, name: str) -> dict[str, Any]:
        """Return the prepared row. Raises `DataError` as the builder does, and for weights that cannot be."""
        source = self.builder.source(row, f"{name}, row {index + 1}")
        if row.get(WEIGHT) is not None and WEIGHT in self.builder.fields:
            raise DataError(
                f"{source.where}: column {WEIGHT!r} weighs the row, and a prompt template has it as {{{WEIGHT}}}; give "
                "the text for the template another name"
            )
        weights = Weights(*source.message_weights(), source.row_weight())
        self._check_prompt(weights, source)
        prepared = self.builder.views(source)
        completion = source.completion()
        if completion is None:
            return prepared | {WEIGHTS_COLUMN: [0.0] * len(prepared["labels"]), STAYS: True}
        labels = prepared["labels"]
        prompt = prompt_of(self.builder.student_template, source)
        of_tokens = weights.of_tokens(self.builder.encoder, prompt, completion, labels, source)
        if any(weights.prompt):
            labels = list(prepared["input_ids"])
        prepared |= self._masked_teacher(prepared, of_tokens, weights, completion, source)
        prepared |= {"labels": masked(labels, of_tokens), WEIGHTS_COLUMN: of_tokens}
        return prepared | {STAYS: any(of_tokens)}

    def _check_prompt(self, weights: "Weights", source: SourceRow) -> None:
        number = next((number for number, weight in enumerate(weights.prompt, start=1) if weight > 0), None)
        if number is None:
            return
        is_own = self.builder.student_template is None and not self.builder.has_teacher_view
        if not is_own or isinstance(source.own_prompt(), str):
            reason = "student and teacher see prompts of their own, in which it has no tokens of its own to train"
            remedy = "drop the templates"
        elif not self.builder.completion_required:
            reason, remedy = "the student writes completions of these rows itself", "use trainer: sft"
        else:
            return
        raise DataError(
            f"{source.where}: message {number} of the prompt has a weight above 0, but {reason}; give it weight 0, or "
            f"{remedy}"
        )

    def _masked_teacher(
        self,
        prepared: dict[str, Any],
        of_tokens: list[float],
        weights: "Weights",
        completion: Completion,
        row: SourceRow,
    ) -> dict[str, Any]:
        """The labels of the teacher's view, without what has weight 0."""
        theirs = prepared.get("teacher_labels")
        if theirs is None:
            return {}
        if self.builder.teacher_encoder is self.builder.encoder:
            return {"teacher_labels": masked_alike(theirs, prepared["labels"], of_tokens, row.where)}
        template = self.builder.teacher_template
        prompt = prompt_of(None if isinstance(template, PanelTemplates) else template, row)
        own = weights.of_tokens(self.builder.teacher_encoder, prompt, completion, theirs, row)
        return {"teacher_labels": masked(theirs, own)}


@dataclass(frozen=True)
class Weights:
    """What a row weighs: the messages of its prompt and of its completion, if they are messages, and all of it."""

    prompt: list[float]
    completion: list[float]
    row: float

    def of_tokens(
        self, encoder: Encoder, prompt: Prompt, completion: Completion, labels: list[int], row: SourceRow
    ) -> list[float]:
        """What the tokens of a prepared view weigh; `labels` are -100 over its prompt."""
        start = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
        count = len(labels) - start
        before = [0.0] * start
        if not any(self.prompt) and len(set(self.completion)) < 2:
            return before + [self.row * (self.completion or [1.0])[0]] * count
        of_prompt, of_completion = token_weights(encoder, prompt, completion, (self.prompt, self.completion), row)
        if any(self.prompt):
            before = cut_alike(of_prompt, encoder.prompt_ids(prompt, completion, row), start, encoder.bos_token_id)
        return before + [self.row * weight for weight in of_completion[:count]]
