"""What the user sees when a command fails: one line on stderr and an exit code, in every process of a command.

0 done; 1 the machine failed (a full disk, or any error that is not the input's doing, with its traceback); 2 bad input;
130 interrupted.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from trl_distill_plugins.errors import DistillError

DEBUG_VARIABLE = "TRL_DISTILL_DEBUG"  # set by --debug, so that the processes a command starts see it too


def guarded(prog: str, call: Callable[[], int]) -> int:
    """Return `call()`; say in one line, after `prog`, what went wrong when it is bad input, Ctrl-C or a full disk."""
    try:
        return call()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except DistillError as error:
        return _fail(prog, str(error), 2)
    except Exception as error:
        full = next((cause for cause in _chain(error) if _is_disk_full(cause)), None)
        if full is None:
            raise
        path = getattr(full, "filename", None)
        where = f" while writing {os.fspath(path)!r}" if path else ""
        return _fail(prog, f"no space left on the disk{where}; free some, then run the same command again", 1)


def _fail(prog: str, message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_disk_full(error: BaseException) -> bool:
    """Whether this is what Python, safetensors (text only) or `torch.save` (a wrong file position) raise then."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left on device" in text or ("inline_container" in text and "unexpected pos" in text)
