"""The `rwkv-stream` program: arguments in, data on stdout, everything else on stderr, an exit code.

Commands live one to a module and import what is heavy inside their functions, so that `--help` never loads torch.
This module imports next to nothing: signals are handled before anything else is.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from rwkv_stream import interrupts


def main() -> NoReturn:
    """Run the program; every ending is an exit code of the table in `--help`."""
    try:
        interrupts.install()
        from rwkv_stream.cli.program import run

        code = run()
    except interrupts.Interruption as stop:  # before a command began, or after it ended
        sys.stderr.write(f"error: stopped by {stop}; what is whole has been kept\n")
        code = 128 + stop.signal_number
    sys.exit(code)
