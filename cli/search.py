"""`rwkv-stream search`: the rows of embeddings that are nearest to a query."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example
from rwkv_stream.errors import UsageError

if TYPE_CHECKING:
    from rwkv_stream.tables.search import Hit
    from rwkv_stream.text.readers import Document


@click.command(
    cls=Command,
    name="search",
    short_help="Find the embeddings nearest to a query.",
    epilog=example(
        'rwkv-stream search "a lamp with green panes" books.parquet --unit sentence',
        'rwkv-stream search "disk full" logs.vectors/ --k 20 --from-text access.log --json',
    ),
)
@click.argument("query")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--k", type=click.IntRange(min=1), default=10, show_default=True, help="How many rows.")
@click.option("--unit", metavar="NAME", help="Only rows of this unit: sentence, chunk or document.")
@click.option("--exact", is_flag=True, help="Compare all rows, even in a folder of more than a million.")
@click.option(
    "--from-text",
    metavar="SOURCE",
    help="Take the text around each hit from this file, folder or archive. [default: the documents where they were]",
)
@click.option(
    "--around",
    type=click.IntRange(min=0),
    default=80,
    show_default=True,
    metavar="BYTES",
    help="Text shown before and after a hit; 0 is the row's own text.",
)
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    query: str,
    path: Path,
    k: int,
    unit: str | None,
    exact: bool,
    from_text: str | None,
    around: int,
) -> None:
    """Rank the rows of PATH, a file of `embed` or a folder of its parts, by their cosine with QUERY ("-": stdin).

    The query is embedded as the rows were: same model, pooling and whitening; vectors of another model are refused.
    The search is exact, at constant memory; in a folder of more than a million rows an approximate index is used
    (pip install 'rwkv-stream[index]'), which the first search makes there.
    """
    from rwkv_stream.tables.search import Vectors
    from rwkv_stream.tables.surroundings import surroundings

    vectors = Vectors(path)
    text = sys.stdin.read() if query == "-" else query
    start = None
    if vectors.start.startswith("state "):
        raise UsageError(f"searching '{path}': its documents go on from a state that is no snapshot; search in Python")
    if vectors.start:
        _, start, model = settings.fork(vectors.start)
    else:
        model = settings.load_model()
    hits = vectors.nearest(vectors.embed(text, model, start=start), k=k, unit=unit, exact=exact)
    found = surroundings(hits, _sources(hits, from_text), around) if around else {}
    if settings.json:
        for hit in hits:
            console.emit_json({**asdict(hit), "around": found.get(hit.rank)})
        return
    columns = ("rank", "score", "document", "id", "unit", "bytes", "text")
    rows = (_line(hit, found.get(hit.rank), around) for hit in hits)
    console.emit_table(columns, rows, folded=("document", "text"), spare=("bytes", "unit", "score"))


def _sources(hits: Iterable[Hit], from_text: str | None) -> Iterator[Document]:
    """The documents to cut text from; those of hits that are no files here are left out."""
    from rwkv_stream.text.readers import documents

    if from_text is not None:
        yield from documents([from_text])
        yield from documents([from_text], rows=True)
        return
    for name in dict.fromkeys(hit.document for hit in hits):
        if Path(name).is_file():
            yield from documents([name])


def _line(hit: Hit, text_around: str | None, around: int) -> tuple[str, ...]:
    """The cells of a hit; of its text as much as an excerpt has, `--json` has all of it."""
    from rwkv_stream.text.units import excerpt

    own = (hit.text or "").strip()
    before, found, behind = (text_around or own).partition(own) if own else ("", "", text_around or "")
    # the hit itself is whole; what stands around it was cut at so many bytes, unless the document begins or ends there
    parts = (
        console.excerpt(before, is_cut_before=len(before.encode()) < hit.byte_start),
        found,
        console.excerpt(behind, is_cut_behind=len(behind.encode()) > around - 4),
    )
    shown = excerpt(" ".join(parts)) if hit.excerpt is None else hit.excerpt
    span = f"{hit.byte_start}-{hit.byte_end}"
    named = str(hit.place.get("id") or "")
    return str(hit.rank), f"{hit.score:.4f}", hit.document, named, f"{hit.unit} {hit.index}", span, shown
