"""Options as values: frozen dataclasses that check themselves, made from others by naming what differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def updated(value: T, options: Mapping[str, Any], doing: str) -> T:
    """The value with others for some of its fields; raises UsageError for names that are none of them."""
    known = [field.name for field in fields(value)]
    if unknown := options.keys() - set(known):
        raise UsageError(
            f"{doing}: expected options {', '.join(known)}, found {', '.join(sorted(unknown))}; leave them out"
        )
    return replace(value, **options)
