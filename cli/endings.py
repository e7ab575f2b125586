"""What ends a command beside its own errors: signals, memory that is short, disks that are full, readers that leave."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from rwkv_stream.errors import OutputError, RwkvStreamError, StoppedError
from rwkv_stream.interrupts import Interruption

OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "std::bad_alloc",
)  # torch's words, in any case


_UNWRITABLE = "rwkv_stream.unwritable"


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec error handler: a byte of a name that is not UTF-8 as `\\xff`, as documents are named; else Python's."""
    assert isinstance(error, UnicodeEncodeError)
    if not "\udc80" <= error.object[error.start] <= "\udcff":
        return codecs.backslashreplace_errors(error)
    return f"\\x{ord(error.object[error.start]) - 0xDC00:02x}", error.start + 1


class _ClosedOutput(io.RawIOBase):
    """A stdout that was closed before the program began."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        raise OutputError("writing to stdout: expected it open, found it closed; send it to a file or to /dev/null")


def open_streams() -> None:
    """Make all three standard streams usable, whatever the caller left of them.

    A file that is opened later never gets the number of a closed one; what the encoding of stdout has no bytes for is
    escaped.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 -- both stay open
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_ClosedOutput(), "utf-8", write_through=True)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    codecs.register_error(_UNWRITABLE, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_UNWRITABLE)


def close_stdout() -> None:
    """Write out what is left; what cannot be written is dropped, and the interpreter has nothing to say of it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the machine refuses as RwkvStreamError; whoever read our output and left has seen enough: exit 0."""
    try:
        yield
    except Interruption as stop:
        raise _interrupted(stop, "", "what is whole has been kept") from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            raise click.exceptions.Exit(0) from None
        where = "" if error.filename is None else f": '{error.filename}'"
        raise RwkvStreamError(f"{error.strerror or error}{where}; what was published is kept") from error


@contextlib.contextmanager
def command_errors(ctx: click.Context, kept: str, loading: Mapping[str, Any]) -> Iterator[None]:
    """Raise a signal as StoppedError that says what is `kept`, and memory that is short as RwkvStreamError
    that names what of this command and of `Loading` makes it need less."""
    try:
        yield
    except Interruption as stop:
        raise _interrupted(stop, f"{ctx.info_name}: ", kept) from None
    except (MemoryError, RuntimeError, OSError) as error:
        if not _is_out_of_memory(error):
            raise
        raise RwkvStreamError(_memory_message(error, ctx, loading)) from error


def _interrupted(stop: Interruption, name: str, kept: str) -> StoppedError:
    return StoppedError(f"{name}stopped by {stop}; {kept}", stop.signal_number)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in words for phrase in OUT_OF_MEMORY)


def _memory_message(error: BaseException, ctx: click.Context, loading: Mapping[str, Any]) -> str:
    is_gpu = "cuda" in str(error).lower()
    advice = []
    if is_gpu:
        advice.append("--gpu-memory SIZE, smaller" if "gpu_memory" in loading else "--gpu-memory SIZE")
    if loading.get("dtype") not in ("bf16", "fp16") and loading.get("weights") != "int8":
        advice.append("--dtype bf16")
    if not is_gpu and loading.get("weights") != "int8":
        advice.append("--weights int8")
    if any(param.name == "chunk" for param in ctx.command.params):
        advice.append("a smaller --chunk")
    found = " ".join(str(error).split(". ")[:2]).strip() or type(error).__name__
    return (
        f"{ctx.info_name}: expected enough memory on the {'GPU' if is_gpu else 'machine'}, found too little ({found}); "
        f"it needs less with {', '.join(advice) or 'a smaller model'}; what is whole has been kept"
    )


def _is_reader_gone() -> bool:
    """Whether the other end of stdout is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
