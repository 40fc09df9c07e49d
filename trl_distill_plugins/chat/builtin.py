"""The built-in chat formats, registered as any other plugin's are."""

import json
import re
from typing import TYPE_CHECKING, Any

from trl_distill_plugins.chat.base import ChatFormat
from trl_distill_plugins.chat.messages import Message
from trl_distill_plugins.chat.native import Native
from trl_distill_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALLS = re.compile(r"(?:(?:^|\n)<tool_call>\n[^\n]*\n</tool_call>)+\Z")
_CALL = re.compile(r"<tool_call>\n([^\n]*)\n</tool_call>")


class ChatML(ChatFormat):
    """ChatML as the Qwen2.5 family lays it out, with its tool calls."""

    name = "chatml"
    model_names = (r"qwen-?[12]", r"chatml", r"hermes-[23]", r"\byi-.*chat", r"smollm.*instruct")
    special_tokens = ("<|im_start|>", "<|im_end|>")
    end_of_turn = "<|im_end|>"
    header = r"<\|im_start\|>assistant\n"
    has_tools = True

    def parse(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Message:
        """Tool calls at the end become `tool_calls`; a call that is not JSON stays in the content."""
        found = _CALLS.search(text)
        if found is None:
            return Message("assistant", text)
        try:
            calls = [json.loads(call) for call in _CALL.findall(found[0])]
        except ValueError:
            return Message("assistant", text)
        if not all(isinstance(call, dict) and "name" in call for call in calls):
            return Message("assistant", text)
        return Message(
            "assistant", text[: found.start()], tool_calls=[{"type": "function", "function": call} for call in calls]
        )

    def response_template(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        template = super().response_template(tokenizer)
        template["fields"]["tool_calls"] = {
            "open_pattern": r"\n?<tool_call>\n",
            "close_pattern": r"\n</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        }
        return template


class Alpaca(ChatFormat):
    """Stanford's prompt, turn after turn; EOS ends an answer."""

    name = "alpaca"
    model_names = (r"alpaca",)
    header = r"### Response:"


class Zephyr(ChatFormat):
    """zephyr-7b-beta; the roles are plain text, EOS ends a turn."""

    name = "zephyr"
    model_names = (r"zephyr-7b",)
    header = r"<\|assistant\|>\n"


class _Spaced(ChatFormat):
    """A format that puts a space before an answer."""

    def parse(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Message:
        return Message("assistant", text.removeprefix(" "))

    def response_template(self, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """The space is no part of the content, so transformers' parser is left to strip it."""
        template = super().response_template(tokenizer)
        del template["fields"]["content"]["content_args"]
        return template


class Vicuna(_Spaced):
    """FastChat's vicuna_v1.1."""

    name = "vicuna"
    model_names = (r"vicuna",)
    header = r"ASSISTANT:"


class Mistral(_Spaced):
    """Mistral-7B-Instruct-v0.2: the tokens of mistral-common's version 1."""

    name = "mistral"
    model_names = (r"mi[sx]tral-(?:8x)?7b-instruct-v0\.[12]",)
    header = r"\[/INST\]"


class Llama2(_Spaced):
    """Llama 2 as Meta's generation code writes it. It strips what it renders."""

    name = "llama2"
    aliases = ("llama",)
    model_names = (r"llama-?2.*chat",)
    header = r"\[/INST\]"

    def parse(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Message:
        return Message("assistant", text.strip())


@hookimpl
def register_chat_formats() -> list[type[ChatFormat]]:
    return [ChatML, Alpaca, Llama2, Vicuna, Zephyr, Mistral, Native]
