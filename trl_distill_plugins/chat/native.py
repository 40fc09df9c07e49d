"""The chat template that a tokenizer comes with, made trainable.

Generation tags are put in without reading the template. What it renders for the messages before an answer with a
generation prompt, and for those up to the answer without one, differs by the answer; a template around the original
renders both and tags the difference, up to the end of turn. It is checked by rendering conversations.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trl_distill_plugins.chat.base import ChatFormat, read_template
from trl_distill_plugins.chat.checks import ANSWER, QUESTION, rendered, template_problem
from trl_distill_plugins.chat.messages import Message
from trl_distill_plugins.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Native(ChatFormat):
    """The tokenizer's own chat template, with generation tags."""

    name = "native"

    def template(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Raises `ConfigError` if there is none, or it cannot be trained on."""
        source = _source(tokenizer)
        end = self.end_token(tokenizer)
        trainable, problem = _trainable(source, end, tuple(tokenizer.special_tokens_map.items()))
        if problem:
            raise ConfigError(
                f"the tokenizer's own chat template cannot be trained on: {problem}; "
                "install another chat format, for example chatml"
            )
        return trainable

    def end_token(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The special token that follows an answer."""
        _, after = _around(tokenizer, ANSWER, add_generation_prompt=False)
        tokens = {str(token): None for token in tokenizer.added_tokens_decoder.values() if token.special}
        places = {after.find(token): token for token in sorted(tokens, key=len) if token in after}
        if not places:
            raise ConfigError(
                "the tokenizer's own chat template ends an answer with no special token, so a model would not learn "
                "to stop; install another chat format, for example chatml"
            )
        return places[min(places)]

    def parse(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Message:
        """Whitespace that the template puts around every answer is no part of it."""
        before, after = _around(tokenizer, ANSWER, add_generation_prompt=False)
        prompt = "".join(_around(tokenizer, QUESTION, add_generation_prompt=True))
        lead, trail = before[len(prompt) + len(QUESTION) :], after.partition(self.end_token(tokenizer))[0]
        return Message("assistant", text.removeprefix(lead).removesuffix(trail))

    def response_template(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """The tokenizer's own where it has one."""
        own = getattr(tokenizer, "response_template", None)
        if own is not None:
            return dict(own)
        _, header = _around(tokenizer, QUESTION, add_generation_prompt=True)
        return super().response_template(tokenizer) | {"start_anchor_pattern": re.escape(header)}


def _source(tokenizer: "PreTrainedTokenizerBase") -> str:
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template of its own; install a chat format, for example chatml")
    return str(tokenizer.get_chat_template())


def _around(tokenizer: "PreTrainedTokenizerBase", probe: str, *, add_generation_prompt: bool) -> tuple[str, str]:
    """What the template writes before and after `probe`, a question or its answer."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    source, variables = _source(tokenizer), dict(tokenizer.special_tokens_map)
    length = 2 if probe == ANSWER else 1
    try:
        text = rendered(source, messages[:length], variables, add_generation_prompt=add_generation_prompt).text
    except TemplateError as error:
        raise ConfigError(f"the tokenizer's own chat template does not render a question: {error}") from error
    before, _, after = text.rpartition(probe)
    return before, after


@lru_cache(maxsize=16)
def _trainable(source: str, end: str, special_tokens: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """The template with generation tags, and what is wrong with it."""
    variables = dict(special_tokens)
    if _TAG.search(source):
        return source, template_problem(source, variables, end)
    literal = "'" + end.replace("\\", "\\\\").replace("'", "\\'") + "'"
    trainable = read_template("native").replace("@@END@@", literal).replace("@@SOURCE@@", source.removesuffix("\n"))
    return trainable, template_problem(trainable, variables, end, original=source)
