"""A prompt as a request for a completion, and what is read from the answer."""

from typing import Any

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.teachers.base import Completion, Generation, TeacherPrompt
from trl_distill_plugins.teachers.served.address import OPENAI_URL
from trl_distill_plugins.teachers.served.client import Client


def write_completion(client: Client, generation: Generation, api: str | None, prompt: TeacherPrompt) -> Completion:
    """Have the model continue one prompt; `api` as in `Options`.

    A completion the server filtered out, or that has no text, is empty and finished.
    """
    source = prompt.source
    options = {"temperature": generation.temperature}
    if api == "chat" or (api is None and not isinstance(source, str)):
        messages = [{"role": "user", "content": source}] if isinstance(source, str) else source
        # OpenAI's newer models refuse the old name, other servers may not know the new one.
        limit = "max_completion_tokens" if client.server.url == OPENAI_URL else "max_tokens"
        choice = client.ask("/chat/completions", {"messages": messages, limit: generation.max_new_tokens, **options})
        text = _content(choice)
    else:
        if not isinstance(source, str):
            raise TeacherError(
                "a prompt of chat messages goes to the chat endpoint; leave out teacher_model_init_kwargs: "
                "{api: completions}, or write teacher_prompt_template as text"
            )
        body = {"prompt": source, "max_tokens": generation.max_new_tokens, **options}
        choice = client.ask("/completions", body)
        text = choice.get("text")
    reason = choice.get("finish_reason")
    is_text = isinstance(text, str) and reason != "content_filter"
    return Completion(str(text) if is_text else "", finished=reason != "length")


def _content(choice: dict[str, Any]) -> Any:
    message = choice.get("message")
    return message.get("content") if isinstance(message, dict) else None
