"""What the user sees when a command fails: one line on stderr and an exit code, in every process of a command.

0 done; 1 the machine failed (a full disk, or any error that is not the input's doing, with its traceback); 2 bad input;
130 interrupted.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable

from trl_distill_plugins.errors import DistillError, disk_full_in

DEBUG_VARIABLE = "TRL_DISTILL_DEBUG"  # set by --debug, so that the processes a command starts see it too
RANK_DELAY_SECONDS = 10.0


def guarded(prog: str, call: Callable[[], int]) -> int:
    """Return `call()`; say in one line, after `prog`, what went wrong when it is bad input, Ctrl-C or a full disk."""
    try:
        return call()
    except KeyboardInterrupt:
        if _is_first_rank():
            print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except DistillError as error:
        return _fail(prog, str(error), 2)
    except Exception as error:
        full = disk_full_in(error)
        if full is None:
            raise
        path = getattr(full, "filename", None)
        where = f" while writing {os.fspath(path)!r}" if path else ""
        return _fail(prog, f"no space left on the disk{where}; free some, then run the same command again", 1)


def _fail(prog: str, message: str, code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    if not _is_first_rank():
        time.sleep(RANK_DELAY_SECONDS)  # the first rank says it too, if it failed; its exit ends the others
    print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
