"""The program as a user calls it, in this process or in a fork of it."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from typing import Any
from unittest import mock

from rwkv_stream.cli import main

set_handler = signal.signal  # which tests replace in this process


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


def started(*arguments: object, encoding: str = "utf-8", **options: Any) -> subprocess.Popen[str]:
    """Start `rwkv-stream` with these arguments in a fork of this process, which has torch; options as of `Popen`."""

    def work() -> None:
        code: object = 70
        try:
            gc.enable()
            os.closerange(3, 1 << 16)  # as a new program has it; `Popen` waits for one of them, too
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(number, mode, encoding=encoding) for number, mode in ((0, "r"), (1, "w"), (2, "w"))
            )
            signal.signal = set_handler
            sys.argv = ["rwkv-stream", *map(str, arguments)]
            main()
        except SystemExit as ending:
            code = ending.code
        except BaseException:  # noqa: BLE001 - whatever it is, the parent is to see it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 70)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = ["rwkv-stream"]  # which is not executed: `work` does not return
    return subprocess.Popen(command, preexec_fn=work, restore_signals=False, encoding=encoding, **pipes | options)
