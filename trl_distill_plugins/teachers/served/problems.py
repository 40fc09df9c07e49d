"""What went wrong with a request, in one line that says what would work."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from trl_distill_plugins.errors import TeacherError, did_you_mean
from trl_distill_plugins.teachers.served.address import KEY_VARIABLE, Options, Server

_RESUME = "what was written is kept, and the same command goes on there"


class RefusalError(TeacherError):
    """The server will not answer such a request, however often it is asked.

    Args:
        message: one line.
        status: of HTTP.
        is_absence: the server lacks the endpoint, not the model.
    """

    def __init__(self, message: str, status: int, *, is_absence: bool = False) -> None:
        super().__init__(message)
        self.status, self.is_absence = status, is_absence


@dataclass(frozen=True)
class Problem:
    """A failed request.

    Args:
        kind: the class of the SDK's error, or of this package's.
        status: of HTTP; None where there was no answer.
        text: what the server or the network said, without the key.
        has_key: whether a key was sent.
    """

    kind: str
    status: int | None
    text: str
    has_key: bool


def explain(problem: Problem, server: Server, path: str, models: Sequence[str], options: Options) -> TeacherError:
    """The error to raise. `models` are those the server offers, as far as is known."""
    said = textwrap.shorten(problem.text, 300, placeholder=" ...")
    times = f"asked up to {int(options.max_retries) + 1} times" if options.max_retries else "asked once"
    if problem.status is None:
        return TeacherError(f"{server} {_silence(problem, said, times, options)}; {_RESUME}")
    if problem.status in (401, 403):
        advice = "check" if problem.has_key else "none was sent: set"
        return RefusalError(
            f"{server} refused the key (status {problem.status}: {said}); {advice} the environment variable "
            f"{KEY_VARIABLE}",
            problem.status,
        )
    if problem.status == 404:
        return _not_found(said, server, path, models)
    if problem.status in (408, 409, 429) or problem.status >= 500:
        advice = (
            "wait, or lower generation_batch_size and max_concurrency"
            if problem.status == 429
            else "look into its log, or raise teacher_model_init_kwargs: {max_retries: ...}"
        )
        return TeacherError(f"{server} failed, {times} (status {problem.status}: {said}); {advice}; {_RESUME}")
    return RefusalError(
        f"{server} refused a request to {path} (status {problem.status}: {said}); if it names an option, change that, "
        f"else the row or its template; {_RESUME}",
        problem.status,
    )


def _silence(problem: Problem, said: str, times: str, options: Options) -> str:
    if problem.kind == "APITimeoutError":
        return (
            f"did not answer within {options.timeout:g} s, {times}; lower generation_batch_size or raise "
            "teacher_model_init_kwargs: {timeout: ...}"
        )
    if problem.kind == "UnreadableError":
        return f"gave no answer of this API, {times} ({said}); check the URL, which usually ends in /v1"
    return f"could not be reached, {times} ({said}); start the server, or check the URL"


def _not_found(said: str, server: Server, path: str, models: Sequence[str]) -> RefusalError:
    if models and server.model not in models:
        names = ", ".join(models[:10]) + (", ..." if len(models) > 10 else "")
        return RefusalError(
            f"{server.url} has no model {server.model!r}{did_you_mean(server.model, models) or '.'} It offers: {names}",
            404,
        )
    advice = (
        "write the prompts as chat messages, or set teacher_model_init_kwargs: {api: chat}"
        if path == "/completions"
        else "check the URL, which usually ends in /v1, and the model's name, or set teacher_model_init_kwargs: "
        "{api: completions}"
    )
    return RefusalError(f"{server} has no {path} (status 404: {said}); {advice}", 404, is_absence=True)
