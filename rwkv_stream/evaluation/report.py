"""What an evaluation found: means of its trials, as tables, pictures and one page that needs nothing beside it.

Trials are gone through once, in batches; of pairs the scores are held, for their ranks.
"""

from __future__ import annotations

import base64
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from rwkv_stream.errors import OutputError
from rwkv_stream.evaluation.similarity import spearman
from rwkv_stream.evaluation.tasks import TASKS
from rwkv_stream.extras import needed
from rwkv_stream.files import publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, SCORES = "report.html", "scores.json"
ACROSS = 2  # maps beside each other
SHOWN = 3  # answers of each task on the page
SHOWN_CHARACTERS = 300
DARK = {"text": "#e6e6e6", "ground": "#16181c"}
LIGHT = {"text": "#1c1c1c", "ground": "#ffffff"}


class Mean:
    """A mean of numbers, its standard error, and how many they are."""

    def __init__(self) -> None:
        self.n, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.n += 1
        self._sum += value
        self._squares += value * value

    @property
    def mean(self) -> float:
        return self._sum / self.n if self.n else math.nan

    @property
    def error(self) -> float | None:
        """None of fewer than two."""
        if self.n < 2:
            return None
        return math.sqrt(max(0.0, self._squares - self._sum**2 / self.n) / (self.n - 1) / self.n)


@dataclass(frozen=True, slots=True)
class Score:
    """Of n trials of a task at a length in tokens (and a depth in percent): mean, its standard error, and what guessing
    scores."""

    task: str
    length: int
    n: int
    score: float
    error: float | None
    floor: float
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Position:
    """Bits per byte of the tokens from one position of their documents to another, end excluded; None of no byte."""

    token_start: int
    token_end: int
    documents: int
    tokens: int
    bytes: int
    bits_per_byte: float | None


@dataclass(frozen=True, slots=True)
class Answers:
    """Of n questions with right answers: F1, exact match, the share that stands in the text; of those without the
    share to which nothing was answered."""

    strategy: str
    n: int
    f1: float | None
    exact: float | None
    quoted: float | None
    unanswerable: int
    declined: float | None


@dataclass(frozen=True, slots=True)
class Found:
    """Mean of 1 / rank of the right passage among those of its document, over n questions; `floor`: of a random
    order."""

    method: str
    n: int
    score: float
    error: float | None
    floor: float


@dataclass(frozen=True, slots=True)
class Similarity:
    """Spearman's rank correlation of n pairs; None where all scores are one."""

    method: str
    n: int
    spearman: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. tokens: of all prompts; computed: that were read for them, what they have in common once."""

    model: str
    fingerprint: str
    recall: tuple[Score, ...]
    depths: tuple[Score, ...]
    position: tuple[Position, ...]
    qa: tuple[Answers, ...]
    retrieval: tuple[Found, ...]
    similarity: tuple[Similarity, ...]
    tokens: int
    computed: int

    def recall_table(self) -> tuple[list[str], list[list[str]]]:
        """Task × length, in percent, as papers print it: columns and rows, the last one means."""
        lengths = sorted({score.length for score in self.recall})
        scores = {(score.task, score.length): score for score in self.recall}
        rows = []
        for task in [task for task in TASKS if any(key[0] == task for key in scores)]:
            found = [scores.get((task, length)) for length in lengths]
            floor = max(score.floor for score in found if score is not None)
            rows.append([task, _percent(floor), *(_percent(None if s is None else s.score) for s in found)])
        means = [[s.score for s in self.recall if s.length == length] for length in lengths]
        if len(rows) > 1:
            rows.append(["mean", "", *(_percent(sum(some) / len(some)) for some in means)])
        return ["task", "floor", *map(str, lengths)], rows

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and rows of all tables that there is something for."""
        if self.recall:
            yield "Recall, % (tokens read)", *self.recall_table()
        if self.position:
            yield (
                "Bits per byte by position",
                ["tokens", "documents", "bytes", "bits per byte"],
                [
                    [
                        f"{p.token_start:,} to {p.token_end:,}",
                        str(p.documents),
                        f"{p.bytes:,}",
                        f"{p.bits_per_byte:.4f}",
                    ]
                    for p in self.position
                ],
            )
        if self.qa:
            columns = ["strategy", "questions", "F1", "exact", "in the text", "unanswerable", "declined"]
            yield (
                "Answers, %",
                columns,
                [
                    [
                        a.strategy, str(a.n), *map(_percent, (a.f1, a.exact, a.quoted)), str(a.unanswerable),
                        _percent(a.declined),
                    ]
                    for a in self.qa
                ],
            )  # fmt: skip
        if self.retrieval:
            yield (
                "Finding the passage",
                ["method", "questions", "1 / rank", "±", "random order"],
                [[f.method, str(f.n), f"{f.score:.4f}", _four(f.error), f"{f.floor:.4f}"] for f in self.retrieval],
            )
        if self.similarity:
            yield (
                "Similarity",
                ["method", "pairs", "Spearman"],
                [[s.method, str(s.n), _four(s.spearman)] for s in self.similarity],
            )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# ---- from trials ----


def report(trials: Path, model: str, fingerprint: str) -> Report:
    """The report of a table of trials."""
    recall, depths, floors = (defaultdict[Any, Mean](Mean) for _ in range(3))
    positions = defaultdict[int, list[float]](lambda: [0, 0, 0, 0])
    answers = defaultdict[str, dict[str, Mean]](lambda: defaultdict(Mean))
    found, chance = (defaultdict[str, Mean](Mean) for _ in range(2))
    pairs = defaultdict[str, list[tuple[float, float]]](list)
    tokens = computed = 0
    for trial in read_trials(trials):
        task, method, value = trial["task"], trial["method"], trial["score"]
        if task in TASKS:
            recall[task, trial["length"]].add(value)
            floors[task, trial["length"]].add(trial["floor"])
            if trial["depth"] is not None:
                depths[task, trial["length"], trial["depth"]].add(value)
            tokens, computed = tokens + trial["tokens"], computed + trial["computed"]
        elif task == "position":
            for i, more in enumerate((1, trial["tokens"], trial["bytes"], trial["bits"])):
                positions[trial["length"]][i] += more
        elif task == "qa":
            has_answer = value is not None
            if has_answer:
                for name in ("score", "exact", "quoted"):
                    answers[method][name].add(float(trial[name]))
            else:
                answers[method]["declined"].add(not trial["answer"])
        elif task == "retrieval":
            found[method].add(value)
            chance[method].add(trial["floor"])
        elif task == "similarity":
            pairs[method].append((value, trial["gold"]))
    first = min(positions, default=0)
    return Report(
        model,
        fingerprint,
        tuple(
            Score(task, length, m.n, m.mean, m.error, floors[task, length].mean)
            for (task, length), m in sorted(recall.items(), key=_in_order)
        ),
        tuple(
            Score(task, length, m.n, m.mean, m.error, floors[task, length].mean, depth)
            for (task, length, depth), m in sorted(depths.items(), key=_in_order)
        ),
        tuple(
            Position(0 if end == first else end // 2, end, int(n), int(t), int(size), bits / size if size else None)
            for end, (n, t, size, bits) in sorted(positions.items())
        ),
        tuple(_answers(method, means) for method, means in answers.items()),
        tuple(Found(method, m.n, m.mean, m.error, chance[method].mean) for method, m in found.items()),
        tuple(Similarity(method, len(some), _correlation(some)) for method, some in pairs.items()),
        tokens,
        computed,
    )


def _in_order(item: tuple[Any, Mean]) -> tuple[Any, ...]:
    (task, *rest), _ = item
    return [*TASKS].index(task), *rest


def _answers(strategy: str, means: Mapping[str, Mean]) -> Answers:
    score, exact, quoted, declined = (means[name] for name in ("score", "exact", "quoted", "declined"))
    f1, exactly, in_text, nothing = (m.mean if m.n else None for m in (score, exact, quoted, declined))
    return Answers(strategy, score.n, f1, exactly, in_text, declined.n, nothing)


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    value = spearman(*zip(*pairs, strict=True))
    return None if math.isnan(value) else value


def read_trials(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as table:
        for batch in table.iter_batches(1024):
            yield from batch.to_pylist()


# ---- pictures ----


def check_pictures() -> None:
    """Raise OutputError where nothing can be drawn, before anything is measured for it."""
    with needed("matplotlib", "eval", "drawing a report", OutputError):
        import matplotlib  # noqa: F401


def heat_maps(scores: Iterable[Score], theme: Mapping[str, str] = LIGHT) -> bytes | None:
    """A PNG with a map of each task that has depths: length across, depth down, 0 to 1; None where no task has."""
    tasks: dict[str, list[Score]] = {}
    for score in scores:
        tasks.setdefault(score.task, []).append(score)
    if not tasks:
        return None
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_colours(theme)):
        across = min(ACROSS, len(tasks))
        down = -(-len(tasks) // across)
        figure = Figure(figsize=(4.2 * across, 3.4 * down), layout="constrained")
        places = figure.subplots(down, across, squeeze=False).flat
        for axes in places[len(tasks) :]:
            axes.remove()
        for axes, (task, found) in zip(places, tasks.items(), strict=False):
            lengths, depths = (sorted({getattr(score, name) for score in found}) for name in ("length", "depth"))
            values = np.full((len(depths), len(lengths)), np.nan)
            for score in found:
                values[depths.index(score.depth), lengths.index(score.length)] = score.score
            axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if not np.isnan(value):
                    colour = "white" if value < 0.6 else "black"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axes.set_xlabel("tokens")
            axes.set_ylabel("depth, %")
            axes.set_title(task, fontsize=10)
        return _png(figure)


def curve(positions: Sequence[Position], theme: Mapping[str, str] = LIGHT) -> bytes | None:
    """A PNG of bits per byte over position; None where there are none."""
    if not positions:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_colours(theme)):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.add_subplot()
        bits = [math.nan if p.bits_per_byte is None else p.bits_per_byte for p in positions]
        axes.plot([p.token_end for p in positions], bits, marker="o", color="tab:blue")
        axes.set_xscale("log", base=2)
        axes.set_xticks([p.token_end for p in positions], [f"{p.token_end:,}" for p in positions], rotation=45)
        axes.set_xlabel("tokens from the beginning, up to")
        axes.set_ylabel("bits per byte")
        axes.grid(alpha=0.3)
        return _png(figure)


def _colours(theme: Mapping[str, str]) -> dict[Any, Any]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {**dict.fromkeys(names, theme["text"]), **dict.fromkeys(ground, theme["ground"])}


def _png(figure: Figure) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


# ---- the page ----

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c1c1c; --soft: #6b7280; --line: #d9dce1; --band: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181c; --text: #e6e6e6; --soft: #9aa1ac; --line: #353941; --band: #1f2228; } }
body { background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 2rem 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, small { color: var(--soft); } code { overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
td { vertical-align: top; white-space: pre-wrap; }
picture { display: block; margin-top: 1.4rem; } img { max-width: 100%; }
""".strip()


def page(found: Report, trials: Iterable[Mapping[str, Any]]) -> str:
    """The page in HTML: tables, pictures for light and for dark, and some of the answers."""
    title = f"Evaluation of {escape('/'.join(Path(found.model).parts[-2:]))}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p><code>{escape(found.model)}</code><br>fingerprint <code>{escape(found.fingerprint)}</code></p>",
    ]
    pictures = {
        "Recall, % (tokens read)": [heat_maps(found.depths, theme) for theme in (LIGHT, DARK)],
        "Bits per byte by position": [curve(found.position, theme) for theme in (LIGHT, DARK)],
    }
    for name, columns, rows in found.tables():
        parts += [f"<h2>{escape(name)}</h2>", _table(columns, rows)]
        light, dark = pictures.get(name, [None, None])
        if light is not None and dark is not None:
            parts.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
                f'<img alt="{escape(name)}" src="{_inline(light)}"></picture>'
            )
    if found.recall:
        parts.append(
            f"<p>A guesser scores the floor. For prompts of {found.tokens:,} tokens {found.computed:,} were read: what "
            "prompts have in common was read once.</p>"
        )
    shown = _shown(trials)
    if shown:
        parts += ["<h2>Some answers</h2>", _table(["task", "asked", "right", "answered"], shown, "text")]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'
    )


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _shown(trials: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The first answers of each task and strategy."""
    counts: dict[tuple[str, str | None], int] = defaultdict(int)
    shown = []
    for trial in trials:
        key = trial["task"], trial["method"]
        if trial["answers"] is not None and counts[key] < SHOWN:
            counts[key] += 1
            name = trial["task"] if trial["method"] is None else f"{trial['task']}, {trial['method']}"
            right = ", ".join(trial["answers"]) or "(not in the text)"
            shown.append([_cut(text) for text in (name, trial["question"].strip(), right, trial["answer"])])
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def write(found: Report, trials: Path, folder: Path) -> None:
    """Write the page, the pictures and the scores beside the trials. Raises OutputError."""
    files: dict[str, bytes | None] = {
        SCORES: (json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n").encode(),
        PAGE: page(found, read_trials(trials)).encode("utf-8", "replace"),
        "heatmaps.png": heat_maps(found.depths),
        "position.png": curve(found.position),
    }
    for name, data in files.items():
        if data is not None:
            try:
                publish(folder / name, data)
            except OSError as error:
                raise OutputError(f"writing '{folder / name}': {error.strerror or error}") from error
