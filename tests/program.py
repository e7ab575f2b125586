"""The program as a user calls it, in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from rwkv_stream.cli import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def program(*arguments: object) -> Ended:
    """Run `rwkv-stream` with these arguments to its end."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch.object(sys, "argv", ["rwkv-stream", *map(str, arguments)]):
                main()
        except SystemExit as ending:
            code = ending.code
    said = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    assert type(code) is int
    return Ended(code, *said)
