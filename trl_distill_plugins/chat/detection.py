"""Which chat format a tokenizer or a model has."""

import re
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from trl_distill_plugins.chat.base import ChatFormat
from trl_distill_plugins.chat.checks import rendered
from trl_distill_plugins.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "quizzy"},
    {"role": "assistant", "content": "xyzzy"},
    {"role": "user", "content": "plugh"},
]


def detect_chat_format(source: "PreTrainedTokenizerBase | str") -> str | None:
    """The name of the installed format that a tokenizer has, or that a model of this name was trained with; or None.

    A tokenizer with a chat template has the format whose template renders a conversation the same, else `native`. One
    without has the format whose special tokens it knows, else that of its name.
    """
    from trl_distill_plugins.plugins import installed

    formats: list[type[ChatFormat]] = [record.cls for record in installed("chat_formats") if not record.conflict]
    if isinstance(source, str):
        return next((form.name for form in formats if _is_named(form, source)), None)
    if source.chat_template:
        return next((form.name for form in formats if _renders_alike(form(), source)), "native")
    known = source.added_tokens_encoder
    for form in formats:
        tokens = form.special_tokens
        if tokens and all(token in known for token in tokens):
            return form.name
    return detect_chat_format(source.name_or_path) if source.name_or_path else None


def _is_named(form: type[ChatFormat], name: str) -> bool:
    return any(re.search(pattern, name, re.IGNORECASE) for pattern in form.model_names)


def _renders_alike(form: ChatFormat, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's template renders as the format's does; BOS aside, which many leave to the tokenizer."""
    if form.name == "native":
        return False
    variables = dict(tokenizer.special_tokens_map)
    bos = variables.get("bos_token", "")
    try:
        templates = (tokenizer.get_chat_template(), form.template(tokenizer))
        texts = {
            rendered(template, _PROBE, variables, add_generation_prompt=True).text.removeprefix(bos).strip()
            for template in templates
        }
    except (TemplateError, ConfigError):
        return False
    return len(texts) == 1
