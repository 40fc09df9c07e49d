"""How far a long job is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 30.0


def progress(total: int, description: str, unit: str, *, is_shown: bool) -> Any:
    """A context whose `update(n)` counts to `total`; it says nothing unless `is_shown` and there is something to do."""
    is_shown = is_shown and total > 0
    if is_shown and not sys.stderr.isatty():
        return _Lines(total, description, unit)
    return tqdm(total=total, desc=description, unit=unit, disable=not is_shown)


class _Lines:
    """Prints how far it is every half minute, and at the end."""

    def __init__(self, total: int, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done, self.last = 0, time.monotonic()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        """What was done has been said."""

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.done >= self.total or now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"{self.description}: {self.done} of {self.total} {self.unit}s", file=sys.stderr, flush=True)
