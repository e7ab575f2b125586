"""Which module computes which version."""

from __future__ import annotations

from rwkv_stream.model import v4, v5, v6, v7
from rwkv_stream.model.network import Architecture

_MODULES: dict[str, Architecture] = {"4": v4, "5.0": v5, "5.1": v5, "5.2": v5, "6": v6, "7": v7, "7a": v7}


def of(version: str) -> Architecture:
    """The module of an RWKV version, one of VERSIONS."""
    return _MODULES[version]


VERSIONS = tuple(_MODULES)
