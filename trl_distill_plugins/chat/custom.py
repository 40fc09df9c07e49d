"""A chat format of three role templates, for those who have no Jinja to write."""

import re
from typing import TYPE_CHECKING

from trl_distill_plugins.chat.base import ChatFormat, read_template
from trl_distill_plugins.chat.checks import template_problem
from trl_distill_plugins.chat.messages import Message
from trl_distill_plugins.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RoleTemplatesFormat(ChatFormat):
    """Each role's messages by a template with `{content}`, and `{eos_token}` where a turn ends; BOS comes by itself.

        RoleTemplatesFormat("qa", system="{content}\\n", user="Q: {content}\\n", assistant="A: {content}{eos_token}\\n")

    What stands before `{content}` in `assistant` is the generation prompt; a space at its end is generated.
    """

    def __init__(self, name: str, *, system: str, user: str, assistant: str) -> None:
        self.name = name  # type: ignore[misc]
        parts = {role: _split(role, text) for role, text in (("system", system), ("user", user))}
        header, closing = _split("assistant", assistant)
        trail, found, tail = closing.partition("{eos_token}")
        if not found:
            raise ConfigError("the assistant template needs {eos_token} behind {content}; else no answer would end")
        self._lead, self._trail = header[len(header.rstrip(" ")) :], trail
        self.header = _pattern(header.rstrip(" "))
        pieces = {
            "NAME": name,
            "HEADER": header.rstrip(" "),
            "LEAD": self._lead,
            "END": trail + "{eos_token}",
            "TAIL": tail,
        }
        for role, (before, after) in parts.items():
            pieces |= {f"{role.upper()}_BEFORE": before, f"{role.upper()}_AFTER": after}
        self._source = read_template("role_templates")
        for key, text in pieces.items():
            self._source = self._source.replace(f"@@{key}@@", _expression(text))

    def template(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Raises `ConfigError` if the templates do not make a format that can be trained on."""
        variables = dict(tokenizer.special_tokens_map)
        problem = template_problem(self._source, variables, self.end_token(tokenizer))
        if problem:
            raise ConfigError(f"the chat format {self.name!r} cannot be trained on: {problem}")
        return self._source

    def parse(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Message:
        return Message("assistant", text.removeprefix(self._lead).removesuffix(self._trail))


def _split(role: str, text: str) -> tuple[str, str]:
    before, found, after = text.partition("{content}")
    if not found or "{content}" in after:
        raise ConfigError(f"the {role} template needs {{content}} exactly once, got {text!r}")
    return before, after


def _expression(text: str) -> str:
    """A Jinja expression of `text`, in which `{eos_token}` stands for the token."""
    literals = [part.encode("unicode_escape").decode().replace("'", "\\'") for part in text.split("{eos_token}")]
    return "(" + " + eos_token + ".join(f"'{literal}'" for literal in literals) + ")"


def _pattern(text: str) -> str:
    return ".+".join(map(re.escape, text.split("{eos_token}"))) or "$"
