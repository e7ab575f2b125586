"""A picture of surprise along a text: bits a byte over byte position, smoothed, with the strangest units marked.

Memory does not grow with the text: bits are gathered in at most BINS bins, which double in width when it grows past
them. So a bin's edges depend on the length of the text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.errors import OutputError
from rwkv_stream.extras import needed
from rwkv_stream.files import publish
from rwkv_stream.tables.writers import check_output

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from rwkv_stream.store.inspection import Inspection
    from rwkv_stream.tables.score import Surprise

BINS = 1024
MARKED = 5  # units
SMOOTHED_BINS = 33  # of a full picture; fewer where there are fewer bins
LABEL_CHARACTERS = 100
SUFFIXES = (".png", ".svg", ".pdf")


class SurpriseMap:
    """Bits along a text, unit by unit.

    >>> surprise = SurpriseMap()
    >>> for unit in surprise.watch(scored := score("access.log", model=model, top=MARKED)): ...
    >>> surprise.draw("surprise.png", scored.strangest)

    width  of a bin in bytes, a power of two
    bits   fp64 [BINS], of each bin; a unit's bits are spread evenly over its span
    """

    def __init__(self) -> None:
        self.width = 1
        self.bits: npt.NDArray[np.float64] = np.zeros(BINS)
        self.bytes = 0

    def watch(self, units: Iterable[Surprise]) -> Iterator[Surprise]:
        """The same units; each is added as it passes."""
        for unit in units:
            self.add(unit)
            yield unit

    def add(self, unit: Surprise) -> None:
        start, end = unit.byte_start, max(unit.byte_end, unit.byte_start + 1)
        self.bytes = max(self.bytes, end)
        while self.bytes > self.width * BINS:
            self.bits = np.concatenate([self.bits.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2)])
            self.width *= 2
        first, last = start // self.width, (end - 1) // self.width + 1
        edges = np.arange(first, last + 1) * self.width
        self.bits[first:last] += unit.bits * np.diff(edges.clip(start, end)) / (end - start)

    def bits_per_byte(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Of each bin that holds text the byte in its middle, and its bits a byte."""
        n = -(-self.bytes // self.width)
        edges = (np.arange(n + 1) * self.width).clip(max=self.bytes)
        return (edges[:-1] + edges[1:]) / 2, self.bits[:n] / np.diff(edges)

    def draw(self, path: str | Path, strangest: Sequence[Surprise] = (), *, title: str = "") -> None:
        """Publish the picture, .png, .svg or .pdf. Raises UsageError (suffix, matplotlib absent), OutputError."""
        check_plot(path)
        from matplotlib.figure import Figure

        middles, bits = self.bits_per_byte()
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(middles, bits, color="0.75", linewidth=0.8, label=f"{self.width} bytes")
        n_smoothed = max(1, len(bits) * SMOOTHED_BINS // BINS)
        if n_smoothed > 1:
            label = f"{self.width * n_smoothed} bytes"
            axes.plot(middles, _smoothed(bits, n_smoothed), color="tab:blue", linewidth=1.5, label=label)
        for number, unit in enumerate(strangest, 1):  # numbers at the points, words below: words would overlap
            label = _label(f"{number}  {unit.label}, {unit.bits_per_byte:.1f} bits per byte: {unit.text.strip()}")
            middle = (unit.byte_start + unit.byte_end) / 2
            mark = axes.plot(middle, unit.bits_per_byte, marker=f"${number}$", markersize=7, color="tab:red")
            mark[0].set_clip_on(False)  # at an edge
            figure.text(0.01, -0.045 * number, label, fontsize=8, color="0.2", parse_math=False)
        axes.set_xlabel("byte")
        axes.set_ylabel("bits per byte")
        axes.set_xlim(0, max(1, self.bytes))
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        axes.set_title(_label(title), fontsize=10, loc="left", parse_math=False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)  # above the curves
        _save(figure, path)


def draw_along(path: str | Path, found: Inspection, *, title: str = "") -> None:
    """Publish a picture of what was recorded on the way to a snapshot, .png, .svg or .pdf: bits per byte, norms and
    drift over the tokens that were read, with the length that the model was trained on.

    raises  UsageError (suffix), OutputError (matplotlib absent, a place that cannot be written)
    """
    check_plot(path)
    from matplotlib.figure import Figure

    curves = found.curves()
    kinds = ("bits per byte", "norm", "drift")
    shown = [kind for kind in kinds if any(name.startswith(kind) for name in curves)] or list(kinds[:1])
    figure = Figure(figsize=(10, 2.5 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(rows, shown, strict=True):
        for name, values in curves.items():
            if name.startswith(kind):
                points = [(one.span.to_token, value) for one, value in zip(found.spans, values, strict=True)]
                known = [(token, value) for token, value in points if value is not None]
                axes.plot(*zip(*known, strict=True), marker=".", linewidth=1, label=name)
        if found.trained_tokens is not None:
            axes.axvline(found.trained_tokens, color="0.5", linestyle="--", linewidth=0.8, label="trained on")
        axes.set_ylabel(kind)
        if kind == "norm":
            axes.set_yscale("log")  # those of a state's tensors lie orders of magnitude apart
        else:
            axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    rows[-1].set_xlabel("token")
    rows[0].set_title(_label(title), fontsize=10, loc="left", parse_math=False)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    picture = BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:], dpi=150, bbox_inches="tight")
    try:
        publish(Path(path), picture.getvalue(), kind="plot")
    except OSError as error:
        raise OutputError(f"drawing '{path}': {error.strerror or error}; nothing was written") from error


def check_plot(path: str | Path) -> None:
    """Raise what `SurpriseMap.draw` would raise for `path`, before anything is scored for it."""
    check_output(path, SUFFIXES)
    with needed("matplotlib", "plot", f"drawing '{path}'", OutputError):
        import matplotlib  # noqa: F401


def _smoothed(values: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    """The mean of n values around each, of fewer at the ends."""
    window = np.ones(n)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _label(text: str) -> str:
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return line if len(line) <= LABEL_CHARACTERS else line[: LABEL_CHARACTERS - 1] + "…"
