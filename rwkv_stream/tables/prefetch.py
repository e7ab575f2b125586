"""Items made on a thread of their own, some of them before they are asked for."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

from rwkv_stream import interrupts

JOIN_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing that a thread hands over, with the reason if it is not the end of its items."""

    error: BaseException | None


def prefetched(items: Generator[T, None, None], size: int) -> Generator[T, None, None]:
    """The same items, made on a thread of their own, up to `size` of them before they are asked for."""
    line: queue.Queue[T | _End] = queue.Queue(size)
    stopped = threading.Event()
    claimed = threading.Lock()

    def make() -> None:
        if not claimed.acquire(blocking=False):
            return
        try:
            with contextlib.closing(items):
                for item in items:
                    line.put(item)
                    if stopped.is_set():
                        break
        except BaseException as error:  # noqa: BLE001 -- raised again where the items are taken
            line.put(_End(error))
        else:
            line.put(_End(None))

    def stop() -> None:
        if claimed.acquire(blocking=False):  # stopped before the thread did anything: it would free the items too late
            items.close()
            return
        stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:
                line.get_nowait()
        if thread.is_alive():
            thread.join(JOIN_S)

    # A daemon, so that nobody waits for a reader that waits for its input; yet one that computes is waited for.
    thread = threading.Thread(target=make, daemon=True)
    atexit.register(stop)
    try:
        with interrupts.blocked():  # were `start` left by what a handler raises, the thread would fail
            thread.start()
        while not isinstance(item := line.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop()
        atexit.unregister(stop)
