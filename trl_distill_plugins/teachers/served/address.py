"""Which model on which server, and how it is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from trl_distill_plugins.errors import ConfigError, TeacherError, did_you_mean
from trl_distill_plugins.losses.checks import check_choice, check_range

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"

_FORM = "teacher_model_name_or_path must be openai:URL#MODEL, for example openai:http://localhost:8000/v1#MODEL"
_SECRETS = ("key", "token", "secret", "password", "header", "auth")


@dataclass(frozen=True)
class Server:
    """A model on a server.

    Args:
        url: where its API begins, without a slash at the end.
        model: the name it goes by there.
    """

    url: str
    model: str

    def __str__(self) -> str:
        return f"openai:{self.url}#{self.model}"

    @classmethod
    def parse(cls, address: str) -> "Server":
        """Read `URL#MODEL`; an empty URL is OpenAI's own. Errors never repeat an address: it may hold a password."""
        url, _, model = address.partition("#")
        url = url.rstrip("/") or OPENAI_URL
        try:
            parts = urlsplit(url)
            is_plain = parts.port is None or parts.port > 0
        except ValueError:
            is_plain = False
        if not is_plain or parts.username is not None or parts.password is not None or parts.query or "#" in model:
            raise TeacherError(
                f"{_FORM}; the URL carries no user, password or query: the key comes from the environment, "
                f"{KEY_VARIABLE}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TeacherError(f"{_FORM}; what stands before # is no http or https URL")
        if not model:
            raise TeacherError(f"{_FORM}; nothing stands behind #")
        return cls(url, model)


@dataclass(frozen=True)
class Options:
    """`teacher_model_init_kwargs` of a served teacher.

    Args:
        api: the endpoint that writes completions, "chat" or "completions". None: chat for prompts of messages,
            completions for text.
        top_logprobs: how many tokens of each position the server is asked to name.
        max_concurrency: texts that are scored at a time.
        timeout: seconds an answer may take.
        max_retries: how often a request is repeated that the server did not answer, or answered with a passing error.
    """

    api: str | None = None
    top_logprobs: int = 20
    max_concurrency: int = 16
    timeout: float = 600.0
    max_retries: int = 5

    def __post_init__(self) -> None:
        if self.api is not None:
            check_choice("api", self.api, ("chat", "completions"))
        check_range("top_logprobs", self.top_logprobs, at_least=1)
        check_range("max_concurrency", self.max_concurrency, at_least=1)
        check_range("timeout", self.timeout, above=0.0)
        check_range("max_retries", self.max_retries, at_least=0)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Options":
        """Read the options; an unknown one is refused by name, and its value is not repeated."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name in known:
                continue
            if any(word in name.lower() for word in _SECRETS):
                raise TeacherError(
                    f"teacher_model_init_kwargs: {name} is not taken: configs are logged and saved. Leave it out, and "
                    f"set the environment variable {KEY_VARIABLE}"
                )
            raise ConfigError(
                f"teacher_model_init_kwargs: a served teacher has no option {name!r}{did_you_mean(name, known) or '.'} "
                f"Options: {', '.join(known)}"
            )
        return cls(**values)
