"""`rwkv-stream bench`: what this machine makes of a model."""

from __future__ import annotations

import dataclasses

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Command, example


@click.command(
    cls=Command,
    name="bench",
    short_help="Measure reading, decoding, memory and snapshots.",
    epilog=example("rwkv-stream bench --model rwkv7-g1-0.4b-20250324-ctx4096 --dtype bf16"),
)
@click.option("--tokens", type=click.IntRange(min=64), default=8192, show_default=True, help="To read, about so many.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Figures are medians of these."
)
@click.pass_obj
def command(settings: GlobalOptions, /, tokens: int, rounds: int) -> None:
    """Measure a model on this machine, beside what its matrix products and its memory could do at most."""
    from rwkv_stream.bench import bench

    model = settings.load_model()
    found = bench(model, tokens=tokens, rounds=rounds)
    facts = {"model": model.path, "version": model.config.version, **model.numerics(1), **dataclasses.asdict(found)}
    if settings.json:
        console.emit_json(facts)
        return
    rows = [
        ("computed with", console.named(model.numerics(1))),
        ("matrix products", f"{found.gemm_flop_s / 1e9:,.0f} GFLOP/s"),
        ("reading memory", f"{found.read_bytes_s / 1e9:,.1f} GB/s"),
        ("reading", f"{found.prefill_tok_s:,.0f} tok/s, {found.prefill_share:.0%} of what its products allow"),
        *(
            (
                f"decoding, {B} at once",
                f"{rate:,.0f} tok/s, {found.decode_share[B]:.0%} of what reading its weights allows",
            )
            for B, rate in found.decode_tok_s.items()
        ),
        ("ingest", f"{found.ingest_tok_s:,.0f} tok/s, with tokenizer and store"),
        ("snapshot", f"{console.size(found.snapshot_bytes)} on disk, restored in {found.restore_s * 1000:.1f} ms"),
        ("memory", f"{console.size(found.weight_bytes)} of weights, {console.size(found.peak_rss_bytes)} at most"),
    ]
    console.emit_table(("what", "found"), iter(rows))
