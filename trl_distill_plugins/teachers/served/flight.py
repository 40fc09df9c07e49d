"""Many requests at a time, each answer handed on as soon as it is there."""

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def as_finished(work: Callable[[T], R], items: Sequence[T], limit: int) -> Iterator[tuple[int, R]]:
    """Yield `(index, work(item))` of all items in the order in which they finish, with `limit` in work at a time.

    After the first failure no item is begun; what is in work is waited for and yielded, then the failure is raised. A
    caller who stops early, as Ctrl-C does, waits for nothing: the threads are daemons, and begin no other item.
    """
    numbers, lock, stopped = iter(range(len(items))), threading.Lock(), threading.Event()
    results: SimpleQueue[tuple[int, R] | BaseException | None] = SimpleQueue()

    def loop() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    index = next(numbers, None)
                if index is None:
                    break
                results.put((index, work(items[index])))
        except BaseException as failure:
            stopped.set()
            results.put(failure)
        finally:
            results.put(None)

    workers = min(int(limit), len(items))
    for _ in range(workers):
        threading.Thread(target=loop, daemon=True).start()
    failure: BaseException | None = None
    try:
        while workers:
            result = results.get()
            if result is None:
                workers -= 1
            elif isinstance(result, BaseException):
                failure = failure or result
            else:
                yield result
    finally:
        stopped.set()
    if failure is not None:
        raise failure
