"""`rwkv-stream embed`: texts in, vectors out, as one table or as a job of many parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from rwkv_stream.cli import jobs
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.jobs import job_options
from rwkv_stream.cli.options import Command, example, position_options, reading_options


@click.command(
    cls=Command,
    name="embed",
    short_help="Make vectors of texts.",
    kept="files and parts that are whole are kept, of others nothing is left; run it again to go on",
    epilog=example(
        "rwkv-stream embed samples/ -o samples.parquet --unit sentence,document",
        "rwkv-stream embed articles.jsonl --text-column body --id-column url -o articles/",
    ),
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR/",
    required=True,
    help="A .parquet or .jsonl file; or a folder, which makes it a job: parts, and going on where it was stopped.",
)
@click.option(
    "--unit",
    default="document",
    show_default=True,
    metavar="KIND,...",
    help="What a row stands for: sentence, chunk, document, or several of these.",
)
@click.option(
    "--pooling",
    type=click.Choice(["auto", "head", "mean", "last"]),
    default="auto",
    show_default=True,
    help="Of a unit's tokens: by the model's vector head (auto: where there is one), their mean, or the last.",
)
@click.option("--isolated", is_flag=True, help="Read each unit on its own, not as going on from the text before it.")
@click.option("--chunk", type=click.IntRange(min=1), metavar="T", help="Tokens of the unit chunk. [default: 1024]")
@click.option("--language", default="en", show_default=True, help="Of the sentences, as a code of two letters.")
@click.option("--no-text", is_flag=True, help="Leave the columns of the text and of its beginning empty.")
@click.option("--whiten", is_flag=True, help="Spread the vectors evenly; what was fitted is kept beside the table.")
@job_options
@click.option("--from-snapshot", metavar="REF", help="Read each document as going on from this snapshot.")
@position_options
@click.option("--name", help="Name of the document; stdin needs one. [default: the path as typed]")
@reading_options
@click.pass_obj
def command(
    settings: GlobalOptions,
    /,
    sources: tuple[str, ...],
    output: str,
    unit: str,
    pooling: str,
    isolated: bool,
    chunk: int | None,
    language: str,
    no_text: bool,
    whiten: bool,
    from_snapshot: str | None,
    **arguments: Any,
) -> None:
    """Write a vector for each sentence, chunk or whole document of every SOURCE (file, folder, glob, URL, or - for
    stdin); of tables and archives each row and member is a document. Prints the number of rows.

    A run that was stopped goes on when it is started again, and a folder grows when its inputs have grown: new rows
    and files become new parts. Changed or removed inputs are refused.
    """
    how = jobs.given(arguments, output, "embedding")
    from rwkv_stream.tables.embedding import Embedding
    from rwkv_stream.text.chunker import CHUNK_TOKENS

    embedding = Embedding(
        units=unit,
        pooling=pooling,
        isolated=isolated,
        chunk=CHUNK_TOKENS if chunk is None else chunk,
        language=language,
        text=not no_text,
    )
    if from_snapshot is not None:
        store, snapshot, model = settings.fork(from_snapshot)
        if store.writable:
            from rwkv_stream.reading.positions import keep

            snapshot = keep(snapshot, store)  # `search` goes on from it, too
        embedding = replace(embedding, start=snapshot)
    else:
        model = settings.load_model()
    from rwkv_stream.tables.embed_jobs import embedding_work

    jobs.run(settings, how, sources, embedding_work(embedding, model=model, whiten=whiten), arguments, "embedded")
