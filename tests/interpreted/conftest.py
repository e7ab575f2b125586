"""Triton's interpreter, without its search: before each program, and each function that one calls, it looks through
whole modules for the members that it replaces. They are remembered here; the search is a third of the time."""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtins(package: Any, *context: Any) -> None:
        for name in builtins(package):
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, *context)

    interpreter._patch_builtin = patch_builtins
