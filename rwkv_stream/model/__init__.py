"""Tokens into hidden states, logits, states and text; names are looked up on first use, so that one part of the
package does not load the rest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_stream.model.config import Config
    from rwkv_stream.model.loader import load
    from rwkv_stream.model.loading import Loading
    from rwkv_stream.model.model import Model

_HOMES = {"Config": "config", "Model": "model", "load": "loader", "Loading": "loading"}

__all__ = ["Config", "Loading", "Model", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
