"""A picture of a training: loss, and what is measured on held texts, over the tokens that were read."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.errors import OutputError
from rwkv_stream.extras import needed
from rwkv_stream.files import publish

if TYPE_CHECKING:
    from rwkv_stream.training.run import Measured

SMOOTHED = 50  # parts of the picture, each the mean of its steps


def draw(measured: Sequence[Measured], path: Path) -> None:
    """Publish the picture as .png. Raises OutputError where matplotlib is absent."""
    with needed("matplotlib", "plot", f"drawing '{path}'", OutputError):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    tokens, losses = (np.array([getattr(row, name) for row in measured]) for name in ("tokens", "loss"))
    axes.plot(tokens, losses, color="0.8", linewidth=0.6, label="loss of a step")
    parts = zip(*(np.array_split(z, min(SMOOTHED, len(z))) for z in (tokens, losses)), strict=True)
    axes.plot(*zip(*((x.mean(), y.mean()) for x, y in parts), strict=True), color="tab:blue", label="its mean")
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats a learnt token")
    handles, labels = axes.get_legend_handles_labels()
    held = [(row.tokens, row.bits_per_byte) for row in measured if row.bits_per_byte is not None]
    if held:
        other = axes.twinx()
        other.plot(*zip(*held, strict=True), color="tab:red", marker=".", label="held texts")
        other.set_ylabel("bits per byte")
        for known, more in zip((handles, labels), other.get_legend_handles_labels(), strict=True):
            known.extend(more)
    axes.legend(handles, labels, loc="upper right", fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    publish(path, picture.getvalue(), kind="plot")
