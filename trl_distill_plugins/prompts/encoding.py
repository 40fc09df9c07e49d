"""Prompts and completions to token ids.

The completion is tokenised apart from the prompt, once, because student and teacher share its ids. TRL's SFTTrainer
tokenises prompt and completion as one text, in which the last characters of the one and the first of the other may
merge into one token; here they never do, which is also what a model sees when it generates behind a prompt.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from trl_distill_plugins.errors import ConfigError, DataError
from trl_distill_plugins.prompts.rows import Completion, Message, Prompt, SourceRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", ":")
_PROBE = "a"
_ANSWER = "xyzzy"


class Encoder:
    """Rules of tokenisation for one tokenizer. Needs an `eos_token`; `owner` names in errors whose it is.

    - A text prompt gets the special tokens that the tokenizer puts BEFORE a text (never those it puts after one), and
      never a second time when the text already begins with them.
    - A chat prompt is rendered by the chat template with its generation prompt and gets no other special tokens.
    - A prompt of no tokens becomes `bos_token`, or `eos_token` where there is none: nothing predicts the token at
      index 0, so the completion must not begin there.
    - A completion behind a text prompt is the text and `eos_token`, unless it ends with one or was cut off when it was
      generated.
    - A completion behind a chat prompt is what the chat template renders after the generation prompt. Where the
      generation prompt is no prefix of the rendered conversation (some templates open a thinking block there), the
      prompt ends, as in TRL, where the token ids of the two renderings part.
    - Tokenizers that put a space before a text do not put one before a completion.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", owner: str = "") -> None:
        self._name = f"{owner}'s tokenizer" if owner else "tokenizer"
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the {self._name} has no eos_token, so a completion could not end; set tokenizer.eos_token"
            )
        self.tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.start_ids = _special_ids_before(tokenizer)
        self._adds_space = self._ids("\n" + _PROBE) != self._ids("\n") + self._ids(_PROBE)

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens with which a completion may end: `eos_token`, and the one that ends an answer in a chat."""
        special = {self.eos_token_id, *self.tokenizer.all_special_ids}
        special |= {index for index, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        answer = self._probe_answer
        ids = self._ids(answer) if isinstance(answer, str) else answer
        return list(dict.fromkeys([self.eos_token_id, *[token for token in ids if token in special][-1:]]))

    @cached_property
    def opening(self) -> str:
        """The text with which the chat template opens an answer, behind the generation prompt."""
        answer = self._probe_answer
        return answer[: max(0, answer.find(_ANSWER))] if isinstance(answer, str) else ""

    @cached_property
    def _probe_answer(self) -> str | list[int]:
        """What the chat template makes of an answer; nothing if there is none, or one for other conversations."""
        try:
            return self._split([{"role": "user", "content": _PROBE}], _ANSWER, SourceRow({}, "probe"))[1]
        except (ConfigError, DataError):
            return ""

    def generation_ids(self, prompt: Prompt, row: SourceRow) -> list[int]:
        """Ids to generate from: the whole prompt, for chat messages with the generation prompt."""
        if isinstance(prompt, str):
            ids = self._ids(prompt)
            return self._started(ids if ids[: len(self.start_ids)] == self.start_ids else self.start_ids + ids)
        return self._started(self._ids(self.render(prompt, row, add_generation_prompt=True)))

    def prompt_ids(self, prompt: Prompt, completion: Completion, row: SourceRow) -> list[int]:
        """Ids of `prompt` as training has them in front of `completion`."""
        return self._split(prompt, completion, row)[0]

    def encode(self, prompt: Prompt, completion: Completion, row: SourceRow) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and completion for training."""
        prompt_ids, answer = self._split(prompt, completion, row)
        ids = self.continuation_ids(answer) if isinstance(answer, str) else answer
        if not ids:
            raise DataError(f"{row.where}: the tokenizer makes no token of the completion; remove the row")
        needs_end = isinstance(prompt, str) and not row.is_truncated and ids[-1] != self.eos_token_id
        return prompt_ids, [*ids, self.eos_token_id] if needs_end else ids

    def _split(self, prompt: Prompt, completion: Completion, row: SourceRow) -> tuple[list[int], str | list[int]]:
        """Return the prompt's ids and the text behind them, or its ids where the two had to be tokenised together."""
        if isinstance(prompt, str):
            return self.generation_ids(prompt, row), _as_text(completion, row)
        opened = self.render(prompt, row, add_generation_prompt=True)
        full = self.render(prompt + _as_messages(completion), row, add_generation_prompt=False)
        if full.startswith(opened):
            return self._started(self._ids(opened)), _answer(full[len(opened) :], completion, row)
        closed = self.render(prompt, row, add_generation_prompt=False)
        if not full.startswith(closed):
            raise DataError(
                f"{row.where}: the chat template renders the prompt differently when a completion follows; "
                "set a chat template that renders it alike"
            )
        opened_ids = self._ids(opened)
        full_ids = self._ids(closed + _answer(full[len(closed) :], completion, row))
        length = common_length(opened_ids, full_ids)
        return self._started(full_ids[:length]), full_ids[length:]

    def continuation_ids(self, text: str) -> list[int]:
        """Ids of `text` without the space that some tokenizers put before a text: what follows an anchor."""
        for anchor in _ANCHORS if self._adds_space else ():
            before, both = self._ids(anchor), self._ids(anchor + text)
            if both[: len(before)] == before:  # else anchor and text have merged
                return both[len(before) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _started(self, ids: list[int]) -> list[int]:
        return ids or [self.eos_token_id if self.bos_token_id is None else self.bos_token_id]

    def token_ends(self, text: str) -> list[int]:
        """Where the tokens of `text` end in it, in characters. Raises `ConfigError` for a tokenizer that cannot say."""
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"the {self._name} does not say where a token stands in a text, so the messages of one row cannot have "
                "weights of their own; load a fast tokenizer (use_fast=True)"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in encoded["offset_mapping"]]

    def continuation_ends(self, text: str) -> list[int]:
        """Where the tokens of `continuation_ids` end in `text`."""
        for anchor in _ANCHORS if self._adds_space else ():
            before = self._ids(anchor)
            if self._ids(anchor + text)[: len(before)] == before:
                return [end - len(anchor) for end in self.token_ends(anchor + text)[len(before) :]]
        return self.token_ends(text)

    def render(self, messages: list[Message], row: SourceRow, *, add_generation_prompt: bool) -> str:
        """What the chat template makes of `messages`."""
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"the prompts are chat messages but the {self._name} has no chat template; set tokenizer.chat_template "
                "or chat_template_path, or write the prompt templates as text"
            )
        if not messages:
            raise DataError(f"{row.where}: there is no message before the completion; add a user message")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **_template_arguments(row)
            )
        except TemplateError as error:
            raise DataError(f"{row.where}: the chat template cannot render this conversation: {error}") from None
        return str(text)


def _special_ids_before(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = list(tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
    marked = list(tokenizer(_PROBE)["input_ids"])
    starts = (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
    return marked[: next(starts, 0)]


def _template_arguments(row: SourceRow) -> dict[str, Any]:
    """Arguments of the chat template that TRL reads from the columns `tools` and `chat_template_kwargs`."""
    tools = row.columns.get("tools")
    extra = row.columns.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{row.where}: column 'tools' is not valid JSON: {error}") from None
    return {
        "tools": tools or None,
        **{name: value for name, value in extra.items() if value is not None},
    }


def _as_messages(completion: Completion) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _as_text(completion: Completion, row: SourceRow) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) > 1 or not isinstance(completion[0]["content"], str):
        raise DataError(
            f"{row.where}: a completion of several messages or with tool calls needs a chat prompt; write the "
            "student's prompt template as a list of messages"
        )
    return completion[0]["content"]


def _answer(rendered: str, completion: Completion, row: SourceRow) -> str:
    """What the chat template made of the completion; without the end of turn if the completion was cut off."""
    if not row.is_truncated:
        return rendered
    for content in (_as_text(completion, row), _as_text(completion, row).strip()):
        if content in rendered:
            return rendered[: rendered.index(content) + len(content)]
    raise DataError(
        f"{row.where}: the chat template changes the completion, so where it was cut off cannot be found; "
        "remove the row or its completion_truncated"
    )


def common_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many numbers two sequences begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))
