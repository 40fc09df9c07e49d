"""Every error this package raises on purpose.

    DistillError                what went wrong is the input's doing; the message says where and what would work
    ├── ConfigError             an option is unknown, out of range, or contradicts another
    ├── DataError               a file, row or column cannot be used
    ├── TeacherError            the teacher cannot teach this student
    └── PluginError             a plugin is missing, broken, or registered twice
        └── UnknownPluginError  nothing of that name is installed

The command line prints the message of a `DistillError` in one line and exits with code 2.
"""

import difflib
import errno
import os
import textwrap
from collections.abc import Iterable


class DistillError(Exception):
    """Base of all errors of this package: bad input, described in one line."""


class ConfigError(DistillError, ValueError):
    """An option is unknown, out of range, or contradicts another one."""


class DataError(DistillError, ValueError):
    """A file, row or column cannot be used. The message names file, row and field."""


class TeacherError(DistillError):
    """The teacher cannot teach this student: another tokenizer, no log-probabilities, an unreadable model."""


class PluginError(DistillError):
    """A plugin is missing, broken, or registered twice."""


class UnknownPluginError(PluginError, LookupError):
    """No plugin of that name is installed."""


def load_failure(name: str, error: Exception) -> str:
    """Return in a line why transformers could not load the model or tokenizer `name`."""
    if name.startswith(("/", "./", "../", "~")) and not os.path.isdir(name):
        return "there is no such folder"
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of `known`, or `""` when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def disk_full_in(error: BaseException | None) -> BaseException | None:
    """Return the one of `error` and its causes that says the disk is full, or None."""
    while error is not None:
        if _is_disk_full(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _is_disk_full(error: BaseException) -> bool:
    """Whether this is what Python, safetensors (text only) or `torch.save` (a wrong file position) raise then."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left on device" in text or ("inline_container" in text and "unexpected pos" in text)
