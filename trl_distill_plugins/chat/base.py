"""What a chat format is: a Jinja chat template with what belongs to it."""

import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

from trl_distill_plugins.chat.messages import Message
from trl_distill_plugins.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFormat:
    """A chat format: template, special tokens, end of turn, stop strings and response parser.

    The template emits `bos_token` itself, puts `{% generation %}` tags around an assistant's content and its end of
    turn, not around its header, and ends a generation prompt without a space. `template_problem` says what is wrong.

    Attributes:
        name: how a config names it.
        aliases: other names that lead to it.
        model_names: patterns of model names that were trained with it, for `detect_chat_format`.
        package: the package with the folder `templates` that holds `NAME.jinja`.
        special_tokens: tokens the template writes that a tokenizer needs.
        end_of_turn: the one of them that ends a turn; None for the tokenizer's own `eos_token`.
        header: with what the prompt for an answer ends, as a pattern, for transformers' response parser.
        has_tools: whether it renders tool calls and results.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    model_names: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str] = "trl_distill_plugins.chat"
    special_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None
    header: str = ""
    has_tools: bool = False

    def template(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The chat template to set on `tokenizer`."""
        return read_template(self.name, self.package)

    def end_token(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The token that ends a turn. Raises `ConfigError` if there is none."""
        token = self.end_of_turn or tokenizer.eos_token
        if token is None:
            raise ConfigError(f"the {self.name} format ends a turn with eos_token, which this tokenizer lacks; set it")
        return str(token)

    def stop_strings(self, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Where an answer ends. Broad ones, such as `###`, would cut real answers."""
        return [self.end_token(tokenizer)]

    def parse(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Message:
        """The assistant's message of its text without end of turn: the inverse of rendering."""
        return Message("assistant", text)

    def response_template(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """What `tokenizer.parse_response` of transformers goes by."""
        close = rf"{re.escape(self.end_token(tokenizer))}\s*"
        return {
            "defaults": {"role": "assistant", "content": ""},
            "start_anchor_pattern": self.header,
            "fields": {"content": {"close_pattern": close, "content": "text", "content_args": {"strip": False}}},
        }


@cache
def read_template(name: str, package: str = "trl_distill_plugins.chat") -> str:
    """The text of `templates/NAME.jinja` in a package."""
    return resources.files(package).joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def get_chat_format(chat_format: "str | ChatFormat") -> ChatFormat:
    """The installed format of that name or alias; a `ChatFormat` is returned as it is.

    Raises:
        UnknownPluginError: no installed plugin has a format of that name.
    """
    from trl_distill_plugins.plugins import get_chat_format_class

    return chat_format if isinstance(chat_format, ChatFormat) else get_chat_format_class(chat_format)()
