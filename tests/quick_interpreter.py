"""Triton's interpreter, without its searches: it replaces the members of whole modules before each program and each
function that one calls, and puts them back after it; here once, for good. And it makes a table of dtypes for each
value; here one for each dtype. Imported before any kernel, with TRITON_INTERPRET=1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)

of_scalar = interpreter._get_np_dtype
known: dict[str, Any] = {}


def np_dtype(kind: tl.dtype) -> Any:
    name = kind.scalar.name
    if name not in known:
        known[name] = of_scalar(kind.scalar)
    return known[name]


interpreter._get_np_dtype = np_dtype
