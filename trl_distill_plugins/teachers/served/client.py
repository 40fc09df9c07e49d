"""Requests to an OpenAI-compatible server through the official SDK, which also repeats those that failed in passing."""

import importlib.util
import os
import random
import time
from functools import cached_property
from typing import Any

from trl_distill_plugins.errors import TeacherError
from trl_distill_plugins.teachers.served.address import KEY_VARIABLE, OPENAI_URL, Options, Server
from trl_distill_plugins.teachers.served.problems import Problem, explain

_NO_KEY = "none"  # what a server without a key is sent: the SDK insists on one
_CONNECT_SECONDS = 10.0


class UnreadableError(Exception):
    """An answer that was cut short, or is not what this API answers. Its text is what came."""


class Client:
    """Asks one model. Safe to use from several threads.

    Args:
        server: which one.
        options: patience.

    Raises:
        TeacherError: the SDK or the key is missing.
    """

    def __init__(self, server: Server, options: Options) -> None:
        self.server, self._options = server, options
        if importlib.util.find_spec("openai") is None:
            raise TeacherError(
                f"{server} is asked through the openai SDK, which is not installed; "
                "pip install 'trl-distill-plugins[openai]'"
            )
        if server.url == OPENAI_URL and not _key():
            raise TeacherError(f"{server} needs a key; set the environment variable {KEY_VARIABLE}")

    @cached_property
    def _sdk(self) -> Any:
        import openai

        key = _key()
        if not (key.isascii() and key.isprintable()):
            raise TeacherError(f"{KEY_VARIABLE} holds characters no key has; set it anew")
        timeout = self._options.timeout
        return openai.OpenAI(
            api_key=key or _NO_KEY,
            base_url=self.server.url,
            timeout=openai.Timeout(timeout, connect=min(timeout, _CONNECT_SECONDS)),
            max_retries=int(self._options.max_retries),
        )

    def connect(self) -> None:
        """Load the SDK, before threads do."""
        _ = self._sdk

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send `body` to `path`, "/completions" for one; return the first of the answer's choices.

        Raises:
            RefusalError: the server will not answer this.
            TeacherError: it cannot, and was asked often enough.
        """
        problem: Exception | None = None
        for attempt in range(int(self._options.max_retries) + 1):
            if attempt:
                time.sleep(min(0.25 * 2**attempt, 8.0) * random.uniform(0.75, 1.0))
            choice, problem = self._try(path, body)
            if choice is not None:
                return choice
            if not isinstance(problem, UnreadableError):
                break
        raise self._explained(path, problem)  # outside `except`: no traceback shows what the server said of the key

    def _try(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any] | None, Exception | None]:
        import openai

        try:
            answer = self._sdk.post(path, cast_to=object, body={"model": self.server.model, **body})
        except openai.OpenAIError as problem:
            return None, problem
        except ValueError:  # said to be JSON, and is not
            return None, UnreadableError("it ends early or is not JSON")
        choice = _first_choice(answer)
        return choice, None if choice is not None else UnreadableError(f"{answer!r}")

    def _explained(self, path: str, problem: Exception | None) -> TeacherError:
        models = self._models() if getattr(problem, "status_code", None) == 404 else []
        cause = problem.__cause__ if problem is not None else None
        text = str(problem) if cause is None else f"{problem} {cause}"
        return explain(
            Problem(
                kind=type(problem).__name__,
                status=getattr(problem, "status_code", None),
                text=_without(text, self._sdk.api_key),
                has_key=self._sdk.api_key != _NO_KEY,
            ),
            self.server,
            path,
            models,
            self._options,
        )

    def _models(self) -> list[str]:
        """What the server offers, or nothing where it does not say."""
        import openai

        try:
            answer = self._sdk.with_options(max_retries=0).get("/models", cast_to=object)
            return [str(model["id"]) for model in answer["data"]]
        except (openai.OpenAIError, ValueError, TypeError, KeyError):
            return []


def _key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def _first_choice(answer: Any) -> dict[str, Any] | None:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def _without(text: str, key: str) -> str:
    return text if key == _NO_KEY else text.replace(key, "[key]")
