"""The recurrence of a version in one form: over tokens ("recurrent"), over blocks ("chunked"), or in C++ ("cpu")."""

from __future__ import annotations

import functools

from torch import Tensor

from rwkv_stream.kernels import KERNELS, PADDING, Recurrence, resolve
from rwkv_stream.kernels.recurrence import reference


def recurrence(version: str, form: str) -> Recurrence:
    if form == "cpu":
        return resolve(version, "cpu", "cpu")[1]
    number = KERNELS[version]
    function = reference.FORMS[number][form == "chunked"]

    def rows(
        inputs: tuple[Tensor, ...], constants: tuple[Tensor, ...], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, *new = function(*inputs, *constants, *state)
        return y, tuple(new)

    return Recurrence(rows, functools.partial(reference.segments, rows, PADDING[number]), PADDING[number])
