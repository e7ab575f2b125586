"""SIGINT and SIGTERM: how a program is stopped, and how code says where that may not happen.

Once `install` was called, a signal raises `Interruption` at the next instruction of the main thread, whatever that is:
blocks end, their temporary files vanish, and no code has to ask. Two kinds of code cannot be left at any instruction:
what publishes whole chunks takes a `StopRequest` and looks at it between them, and what starts a thread does so under
`blocked`. Where nothing is installed, a program that uses this package as a library keeps its own handlers.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TypeVar

from rwkv_stream.errors import StoppedError

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RETRY_S = 0.002

_requests: list[StopRequest] = []  # the last one receives the signals


class Interruption(KeyboardInterrupt):
    """A signal that asks the program to end; no `Exception`, so that no code takes it for a failure of its own."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def install() -> None:
    """Let SIGINT and SIGTERM raise `Interruption` in this program, or set the `StopRequest` that receives them."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if _requests:
        _requests[-1](number, frame)
    elif _is_raising_safe(frame):
        raise Interruption(number)
    else:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process there
        signal.signal(signal.SIGALRM, functools.partial(_handle_later, number))
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)


def _handle_later(number: int, _alarm: int, frame: FrameType | None) -> None:
    if not _is_raising_safe(frame):
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        return
    signal.signal(number, _handle)
    _handle(number, frame)


def _is_raising_safe(frame: FrameType | None) -> bool:
    """False within an import and a finalizer: extension modules swallow what is raised there and go on half loaded
    (torch without numpy), the interpreter prints what is raised in `__del__` and goes on."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename.startswith("<frozen importlib"):
            return False
        frame = frame.f_back
    return True


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Let signals that this thread receives wait for the end of the block, whoever handles them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handlers back that what is called in the block replaces."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class StopRequest:
    """Asks a reading to stop; looked at between chunks. During a wait for input it ends the wait at once.

    A signal handler calls it, as any code may that has decided so.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._waiting = False

    def __call__(self, signal_number: int, _frame: object) -> None:
        self.signal_number = signal_number
        if self._waiting:
            raise Interruption(signal_number)

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Let the signals of the program come here until the block ends, instead of raising `Interruption`."""
        _requests.append(self)
        try:
            yield
        finally:
            _requests.remove(self)

    def guard(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; raises StoppedError while waiting for one or before handing it out."""
        items = iter(items)
        while True:
            with self.waiting():
                item = next(items, None)
            if item is None:
                return
            yield item

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done in the block may take as long as it likes: a signal before, in or after it ends it with
        StoppedError, whatever the block makes of that."""
        self._waiting = True
        try:
            self._check()
            yield
        finally:
            self._waiting = False
            self._check()

    def _check(self) -> None:
        if self.signal_number is not None:
            raise StoppedError("interrupted; what is whole has been kept", self.signal_number) from None
