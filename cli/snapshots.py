"""`rwkv-stream snapshots`: look after the store."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from click.core import ParameterSource

from rwkv_stream.cli import console
from rwkv_stream.cli.global_options import GlobalOptions
from rwkv_stream.cli.options import Group, age, example, rule_options
from rwkv_stream.errors import MismatchError, PartialFailureError, SnapshotError, UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from rwkv_stream.store import Imported, Listed, Pulled, Pushed, Snapshot, Store
    from rwkv_stream.store.inspection import Inspection, Loss, Placed
    from rwkv_stream.store.texts import KeptText

SORTS = ("created", "document", "tokens", "bytes", "size")  # `catalog.SORTS`, which is not loaded for --help
LAST_BYTES = 200
WAIT = click.option("--wait", is_flag=True, help="Wait for a locked store instead of ending with 11.")


@click.group(
    cls=Group, name="snapshots", epilog=example("rwkv-stream snapshots list", "rwkv-stream snapshots show book.txt@50%")
)
def command() -> None:
    """Look after the snapshots of a store."""


@command.command(
    name="list",
    epilog=example(
        "rwkv-stream snapshots list book.txt",
        "rwkv-stream snapshots list --sort size --reverse",
        "rwkv-stream snapshots list --tagged --json",
    ),
)
@click.argument("document", required=False)
@click.option("--sort", type=click.Choice(SORTS), default="created", show_default=True, help="Order, least first.")
@click.option("--reverse", is_flag=True, help="Most first.")
@click.option("--tagged", is_flag=True, help="Only those with a tag.")
@click.option("--all", "is_all", is_flag=True, help="The states of chunks and those made at positions too.")
@click.pass_obj
def list_(
    settings: GlobalOptions, /, document: str | None, sort: str, reverse: bool, tagged: bool, is_all: bool
) -> None:
    """List the snapshots: all, or those of one DOCUMENT; with --model those that it made.

    Marks: leaf, which stands off the grid and can be forked, not gone on from; text, whose state is made from its text
    when it is asked for; chunk, of `ingest --cells`; made, at a position that was asked for; tags.
    """
    store = settings.open_store()
    tags = _names_by_snapshot(store.tags())
    model = _chosen_model(settings)
    found = store.list(document, model=model, sort=sort, reverse=reverse, chunk_states=is_all)
    if is_all:
        found = itertools.chain(found, store.positions(document, model=model))
    if tagged:
        found = (entry for entry in found if entry.id in tags)
    if settings.json:
        console.emit_json_lines(_as_row(entry) | {"tags": tags.get(entry.id, [])} for entry in found)
        return
    console.emit_table(
        ("id", "document", "tokens", "text", "size", "parent", "created", "model", "marks"),
        (
            (
                s.id[:12],
                s.document,
                str(s.tokens),
                console.size(s.bytes),
                console.size(s.size_bytes),
                (s.parent or "-")[:12],
                s.created[:16].replace("T", " "),
                s.model[:8],
                " ".join(_marks(s, tags)),
            )
            for s in found
        ),
        folded=("document",),
        spare=("parent", "model", "size", "created", "text"),
    )


def _is_model_chosen() -> bool:
    """Whether `--model` stands on the command line: that of the environment is for reading texts, and hides nothing."""
    context: click.Context | None = click.get_current_context()
    while context is not None:
        if context.get_parameter_source("model") is ParameterSource.COMMANDLINE:
            return True
        context = context.parent
    return False


def _chosen_model(settings: GlobalOptions) -> str | None:
    """Fingerprint of the `--model` on the command line."""
    return settings.model_fingerprint() if _is_model_chosen() else None


def _names_by_snapshot(named: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, snapshot in named:
        names.setdefault(snapshot, []).append(name)
    return names


def _as_row(entry: Listed) -> dict[str, Any]:
    row = entry._asdict() | {"keeps_state": entry.keeps_state}
    del row["removed"]  # what was removed is not shown
    return row


def _marks(entry: Listed, tags: dict[str, list[str]]) -> list[str]:
    is_leaf = entry.leaf and entry.keeps_state and entry.how != "cells"  # what has no state is one in any case
    kind = ["chunk"] * (entry.how == "cells") + ["leaf"] * is_leaf + ["edge"] * entry.edge
    kind += ["text"] * (not entry.keeps_state) + ["made"] * (entry.how == "position")
    return kind + [f"[{tag}]" for tag in tags.get(entry.id, [])]


@command.command(
    name="show",
    epilog=example("rwkv-stream snapshots show book.txt@65536", "rwkv-stream snapshots show book.txt~1 --json"),
)
@click.argument("ref")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw it along the text (extra `plot`).")
@click.pass_obj
def show(settings: GlobalOptions, /, ref: str, plot: Path | None) -> None:
    """Show all there is to know of the snapshot that REF names.

    What is recorded, with -v all fields of it; which text it adds to the snapshot before it; bits per byte, from a
    sample of the tokens; the words that it read last, and where they stand, if the text was kept or the document is
    still there; the norm of each layer of the state; how bits per byte, norms and drift (how far the state moved
    between two snapshots, beside its length) went along the text; and warnings where a norm or the bits per byte run
    away from those before, or the text is longer than those that the model was trained on.
    """
    from rwkv_stream.store.inspection import inspect

    if plot is not None:
        from rwkv_stream.tables.plot import check_plot, draw_along

        check_plot(plot)
    store = settings.open_store()
    snapshot = settings.nearest_to(store, ref, _chosen_model(settings))
    facts = snapshot.facts()
    facts["tags"] = [tag for tag, at in store.tags() if at == snapshot.id]
    facts["heads"] = [document for document, _, at in store.heads() if at == snapshot.id]
    try:
        found = inspect(snapshot, store.ancestors(snapshot))
        text = store.text(snapshot)
        measured = {} if settings.json else _measured(snapshot, found, text)
    except (SnapshotError, MismatchError):
        _emit_facts(settings, facts, {})  # what is recorded of it is whole
        raise
    if plot is not None:
        draw_along(plot, found, title=f"{snapshot.document}@{snapshot.tokens}")
    facts["kept_text_bytes"] = text.size_bytes if text is not None else None
    if settings.json:
        console.emit_json(facts | asdict(found))
        return
    _emit_facts(settings, facts if settings.verbose else _outline(facts), measured)
    before = next((ancestor.norms for ancestor in found.ancestors if ancestor.id == found.nearest_ancestor), None)
    columns = [
        [_norm(norm, old) for norm, old in zip(norms, before[name] if before else [None] * len(norms), strict=True)]
        for name, norms in found.norms.items()
    ]
    if found.norms:
        click.echo()
        console.emit_table(
            ("norm of layer", *found.norms),
            ((str(layer), *row) for layer, row in enumerate(zip(*columns, strict=True))),
        )
    curves = found.curves()
    if curves:
        click.echo()
        console.emit_table(
            ("along the text", "first", "last", "least", "most", "curve"),
            (
                (name, *map(_number, (known[0], known[-1], min(known), max(known))), console.sparkline(values))
                for name, values in curves.items()
                if (known := [value for value in values if value is not None])
            ),
        )
    for warning in found.warnings:
        click.echo(f"warning: {warning}")


def _outline(facts: dict[str, Any]) -> dict[str, Any]:
    """Of what is recorded what a person asks for; with `-v` there is all of it."""
    return {
        "id": facts["id"],
        "document": facts["document"],
        "head of": facts["heads"],
        "tags": facts["tags"],
        "has read": f"{facts['tokens']:,} tokens, {console.size(facts['bytes'])}",
        "state": f"{console.size(facts['state_bytes'])}, {_kept(facts)}",
        "text": "not kept" if facts["kept_text"] is None else f"kept, {console.size(facts['kept_text_bytes'])} on disk",
        "can be": _use(facts),
        "exact": "yes" if facts["exact"] else "no: it went on under other numerics",
        "made": f"{facts['created'][:16].replace('T', ' ')} UTC, by {facts['how']}",
        "model": f"{facts['model'][:12]}, {facts['model_path']}",
    }


def _kept(facts: dict[str, Any]) -> str:
    if not facts["keeps_state"]:
        return "not kept: a model makes it from the text when it is asked for"
    return f"{console.size(facts['size_bytes'])} on disk, {' and '.join(one['codec'] for one in facts['objects'])}"


def _use(facts: dict[str, Any]) -> str:
    from rwkv_stream.store.codecs import EXACT

    if not facts["keeps_state"]:
        return "forked; a longer text is read again from its start"
    codec = facts["objects"][0]["codec"]
    if codec != EXACT:
        return f"forked; what {codec} keeps is near the state, so no reading goes on from it"
    return "forked; it stands off the grid, so no reading goes on from it" if facts["leaf"] else "gone on from"


def _measured(snapshot: Snapshot, found: Inspection, text: KeptText | None) -> dict[str, Any]:
    """What there is to say of a snapshot beyond its record."""
    from rwkv_stream.reading.last_words import last_words

    added = found.added
    tokens, span = f"{added.from_token:,} to {added.to_token:,}", f"{added.from_byte:,} to {added.to_byte:,}"
    to = "" if found.nearest_ancestor is None else f" to snapshot {found.nearest_ancestor[:12]}"
    measured = {
        "adds": f"tokens {tokens}, bytes {span}{to}",
        "bits per byte": _loss(found.loss),
        "of what it adds": _loss(found.added_loss),
    }
    last = last_words(snapshot, LAST_BYTES, text)
    if last is None:
        return measured | {
            "read last": "not to be shown: not kept, and the document is no file here any more, or another text"
        }
    place = console.named(last.place)
    words = console.excerpt(last.text, is_cut_before=len(last.text.encode()) < snapshot.bytes)
    return measured | {"read last": words, "at": place}


def _emit_facts(settings: GlobalOptions, facts: dict[str, Any], measured: dict[str, Any]) -> None:
    if settings.json:
        console.emit_json(facts)
    else:
        console.emit_table(("field", "value"), ((name, _value(value)) for name, value in (facts | measured).items()))


def _value(value: Any) -> str:
    if isinstance(value, dict):
        shown: str = console.named(value)
        return shown
    if isinstance(value, list):
        return "; ".join(map(_value, value)) or "-"
    return "-" if value is None else str(value)


def _loss(loss: Loss | None) -> str:
    return "not recorded" if loss is None else f"{loss.bits_per_byte:.3f}, by a sample of {loss.sampled_tokens} tokens"


def _norm(norm: float | None, before: float | None) -> str:
    """And how many times that of the snapshot before it is."""
    return _number(norm) + (f" (x{norm / before:.2f})" if norm is not None and before else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@command.command(name="tree", epilog=example("rwkv-stream snapshots tree book.txt"))
@click.argument("document", required=False)
@click.pass_obj
def tree(settings: GlobalOptions, /, document: str | None) -> None:
    """Show how the snapshots descend from each other: all, or one DOCUMENT's with what they started from and what was
    forked from them.

    A reading begins with o and goes straight down; what was forked from a snapshot stands below it, further right.
    """
    from rwkv_stream.store import inspection

    store = settings.open_store()
    tags = _names_by_snapshot(store.tags())
    heads = _names_by_snapshot((name, at) for name, _, at in store.heads())
    lines = inspection.tree(store.family(document), heads)
    if settings.json:
        console.emit_json_lines(
            _as_row(line.entry)
            | {"tags": tags.get(line.entry.id, []), "heads": heads.get(line.entry.id, []), "depth": len(line.rails)}
            for line in lines
        )
    else:
        console.emit_styled(_tree_line(line, tags, heads.get(line.entry.id, [])) for line in lines)


def _tree_line(line: Placed, tags: dict[str, list[str]], heads: list[str]) -> Iterator[tuple[str, str]]:
    """Its parts, each with a style."""
    entry = line.entry
    yield "".join("| " if goes_on else "  " for goes_on in line.rails) + ("o " if line.is_first else "| "), "blue"
    yield f"{entry.id[:12]} ", "dim"
    yield f"{entry.document}@{entry.tokens}", ""
    for mark in _marks(entry, tags):
        yield f" {mark}", "yellow"
    for head in heads:  # of another name where two documents begin alike
        yield " head" if head == entry.document else f" head of {head}", "bold green"


@command.command(
    name="diff",
    epilog=example(
        "rwkv-stream snapshots diff book.txt@50% book.txt", "rwkv-stream snapshots diff before after --top 20 --json"
    ),
)
@click.argument("ref_a", metavar="A")
@click.argument("ref_b", metavar="B")
@click.option("--top", type=click.IntRange(min=0), default=10, show_default=True, metavar="K", help="Tokens shown.")
@click.pass_obj
def diff(settings: GlobalOptions, /, ref_a: str, ref_b: str, top: int) -> None:
    """Show how snapshot B differs from snapshot A: in each layer of the state, and in what comes next.

    Of each tensor |A-B| / |A|, and the cosine of the two. Of the next token, as the model that made both expects it,
    KL(A|B) in bits, and the tokens whose probability changes most.
    """
    store, a, model = settings.fork(ref_a)
    from rwkv_stream.store.inspection import diff

    b = settings.take(store, ref_b, model)
    found = diff(a, b, model, top=top)
    if settings.json:
        ends = {
            end: {name: getattr(snapshot, name) for name in ("id", "document", "tokens", "bytes")}
            for end, snapshot in (("a", a), ("b", b))
        }
        console.emit_json({**ends, "model": model.fingerprint, **asdict(found)})
        return
    rows: dict[str, list[str]] = {}
    for part in found.layers:
        rows.setdefault(str(part.layer), []).extend(map(_number, (part.distance.relative, part.distance.cosine)))
    names = dict.fromkeys(part.tensor for part in found.layers)
    console.emit_table(
        ("layer", *(column for name in names for column in (name, "cosine"))), ((i, *row) for i, row in rows.items())
    )
    click.echo(
        f"\nlast hidden state: {_number(found.last_hidden.relative)}, cosine {_number(found.last_hidden.cosine)}\n"
        f"next token: KL(A|B) {_number(found.kl_bits)} bits"
    )
    if found.changes:
        click.echo()
        console.emit_table(
            ("token", "text", "in A", "in B"),
            ((str(c.token), repr(c.text), f"{c.a:.4%}", f"{c.b:.4%}") for c in found.changes),
        )


@command.command(
    name="tag",
    epilog=example("rwkv-stream snapshots tag book.txt@50% halfway", "rwkv-stream snapshots tag --delete halfway"),
)
@click.argument("ref")
@click.argument("name", required=False)
@click.option("--delete", is_flag=True, help="Remove the tag REF.")
@click.pass_obj
def tag(settings: GlobalOptions, /, ref: str, name: str | None, delete: bool) -> None:
    """Give the snapshot that REF names the tag NAME."""
    if delete == (name is not None):
        raise click.UsageError("tag takes REF NAME, or --delete TAG")
    store = settings.open_store()
    with store.writing():
        if delete:
            store.untag(ref)
        else:
            assert name is not None
            snapshot = settings.nearest_to(store, ref)
            if snapshot.how == "position":
                from rwkv_stream.reading.positions import keep

                snapshot = keep(snapshot, store)
            store.tag(name, snapshot.id)
            click.echo(snapshot.id)


@command.command(name="rm", epilog=example("rwkv-stream snapshots rm book.txt@16384"))
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--cells", is_flag=True, help="Not these, but the states of chunks of their documents.")
@click.pass_obj
def rm(settings: GlobalOptions, /, refs: tuple[str, ...], cells: bool) -> None:
    """Remove the snapshots that the REFs name; the others stay as they are."""
    store = settings.open_store()
    with store.writing():
        named = [settings.nearest_to(store, ref) for ref in refs]
        for snapshot in [one for each in named for one in store.chunk_states(each)] if cells else named:
            store.rm(snapshot.id)
            click.echo(snapshot.id)


@command.command(
    name="verify", epilog=example("rwkv-stream snapshots verify", "rwkv-stream snapshots verify --read-data")
)
@click.option("--read-data", is_flag=True, help="Read and decode every state and text too.")
@click.pass_obj
def verify(settings: GlobalOptions, /, read_data: bool) -> None:
    """Check every record and reference against its checksum and what it refers to, and the catalog against them.

    Indexes of kept texts that are missing or damaged are made again.
    """
    report = settings.open_store().verify(read_data=read_data)
    if settings.json:
        console.emit_json(asdict(report))
    else:
        for damage in report.damaged:
            click.echo(f"{damage.path}\t{damage.reason}")
        settings.notice(
            f"checked {report.checked} files: {len(report.damaged) or 'nothing'} damaged{_indexed(report.indexed)}"
        )
    if report.damaged:
        raise SnapshotError(
            f"verifying '{settings.store_path}': expected every file whole, found {len(report.damaged)} damaged; "
            "run `rwkv-stream snapshots repair`"
        )


def _indexed(count: int) -> str:
    return f"; indexed {console.counted(count, 'extent')} of text again" if count else ""


@command.command(name="rebuild", epilog=example("rwkv-stream snapshots rebuild"))
@click.pass_obj
def rebuild(settings: GlobalOptions, /) -> None:
    """Make the catalog anew from the records and references."""
    count = settings.open_store().rebuild()
    settings.notice(f"catalog rebuilt from {count} records")


@command.command(name="repair", epilog=example("rwkv-stream snapshots repair"))
@WAIT
@click.pass_obj
def repair(settings: GlobalOptions, /, wait: bool) -> None:
    """Put a damaged store right: restore what can be, move the rest to its quarantine folder, say what is lost."""
    from rwkv_stream.store import Store

    report = Store.repair(settings.store_path, wait=wait)
    if settings.json:
        console.emit_json(asdict(report))
        return
    for kind, notes in (("restored", report.restored), ("quarantined", report.quarantined)):
        for note in notes:
            click.echo(f"{kind}\t{note.path}\t{note.reason}")
    for lost in report.lost:
        click.echo(f"lost\t{lost.snapshot}\t{lost.document}: tokens {lost.from_token}-{lost.to_token}")
    settings.notice(
        f"restored {len(report.restored)}, quarantined {len(report.quarantined)}, lost {len(report.lost)} snapshots"
        + _indexed(report.indexed)
        + ("; ingest goes on from the snapshot before, --restart makes lost ones again" if report.lost else ""),
    )


@command.command(
    name="prune",
    epilog=example(
        "rwkv-stream snapshots prune --dry-run",
        "rwkv-stream snapshots prune --keep 16",
        "rwkv-stream snapshots prune --max-store-size 20GB --dry-run",
    ),
)
@rule_options
@click.option("--dry-run", is_flag=True, help="Only say what would go, and what it would cost to have it again.")
@WAIT
@click.pass_obj
def prune(settings: GlobalOptions, /, keep: int | None, max_store_size: int | None, dry_run: bool, wait: bool) -> None:
    """Remove what nothing refers to: superseded readings, states and text of removed snapshots, states that were made
    at positions, leftovers.

    A snapshot stays that a document's newest reading or a tag leads back to. With --keep or --max-store-size all
    readings are thinned, too; but never what is tagged or at an edge (`ingest --snapshot-at`), the newest, or what a
    reading was started from.
    """
    from rwkv_stream.store.retention import Rule

    report = settings.open_store(wait=wait).prune(Rule(keep, max_store_size), dry_run=dry_run)
    if settings.json:
        console.emit_json(asdict(report))
        return
    for one in report.thinned:
        click.echo(
            f"{one.document}: {console.counted(one.snapshots, 'snapshot')} {'would go' if dry_run else 'gone'}, "
            f"{console.size(one.bytes)}; to have {'them' if one.snapshots > 1 else 'it'} again "
            f"{console.counted(one.reread, 'token')} are read, to fork anywhere {one.hole:,} at the most"
        )
    click.echo(
        f"{'would remove' if dry_run else 'removed'} {console.counted(report.snapshots, 'snapshot')}, "
        f"{console.counted(report.objects, 'state')}, {console.counted(report.texts, 'extent')} of text, "
        f"{console.counted(report.made, 'made state')}, {console.counted(report.strays, 'leftover')}: "
        f"{console.size(report.bytes)}"
    )


@command.command(
    name="recode",
    epilog=example(
        "rwkv-stream snapshots recode book.txt --codec int8",
        "rwkv-stream snapshots recode --codec int16",
        "rwkv-stream snapshots recode --codec int8 --older-than 30d",
    ),
)
@click.argument("document", required=False)
@click.option(
    "--codec",
    type=click.Choice(["int16", "int8"]),
    required=True,
    help="Whole numbers of 16 or 8 bits and a scale for each 128 of them.",
)
@click.option(
    "--keep-exact",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="The newest N snapshots of each reading stay exact; so does what is tagged.",
)
@click.option(
    "--older-than",
    type=age,
    metavar="AGE",
    help="Only states that were made so long ago (12h, 30d, 8w), or before a date (2026-11-02). [default: all]",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be won.")
@WAIT
@click.pass_obj
def recode(
    settings: GlobalOptions,
    /,
    document: str | None,
    codec: str,
    keep_exact: int,
    older_than: datetime | None,
    dry_run: bool,
    wait: bool,
) -> None:
    """Keep the states of DOCUMENT, or of all, in fewer bytes, near what they were; `certify` says how near.

    Ids stay. They can be asked as before; a reading goes on from exact ones only. What is left out is gone: to have it
    again, ingest the document again.
    """
    report = settings.open_store(wait=wait).recode(
        codec, document, keep_exact=keep_exact, older_than=older_than, dry_run=dry_run
    )
    if settings.json:
        console.emit_json(asdict(report))
        return
    click.echo(
        f"{console.counted(report.snapshots, 'state')} {'would be' if dry_run else 'now'} kept as {codec}: "
        f"{console.size(report.bytes_before)} to {console.size(report.bytes_after)}; "
        f"{report.exact:,} as before"
    )


@command.command(
    name="certify",
    epilog=example("rwkv-stream snapshots certify book.txt", "rwkv-stream snapshots certify book.txt --json"),
)
@click.argument("ref")
@click.pass_obj
def certify(settings: GlobalOptions, /, ref: str) -> None:
    """Measure what each codec costs: how the model goes on after states of the reading at REF were restored from it.

    At up to 16 snapshots, 512 tokens of the kept text are read from the state itself and from what each codec makes of
    it: bytes on disk beside those of fp32, bits per byte of the text, how far the chances of the next token move (KL,
    nats: mean and worst), and how often the most likely one is another.
    """
    from rwkv_stream.evaluation.certify import certify as measure

    store, snapshot, model = settings.named(ref)
    found = measure(snapshot, model=model, store=store)
    if settings.json:
        for certificate in found:
            console.emit_json(asdict(certificate))
        return
    costs = ("bits per byte", "mean KL", "worst KL", "flips", "write ms", "read ms")
    console.emit_table(
        ("codec", "places", "tokens", "of fp32", *costs),
        (
            (
                one.codec, str(one.places), str(one.tokens), f"{one.share:.1%}", f"{one.bits:.4f}", f"{one.kl:.1e}",
                f"{one.worst_kl:.1e}", str(one.flips), f"{one.write_ms:.1f}", f"{one.read_ms:.1f}",
            )
            for one in found
        ),
        spare=("write ms", "read ms", "places"),
    )  # fmt: skip


@command.command(
    name="prove",
    epilog=example("rwkv-stream snapshots prove book.txt", "rwkv-stream snapshots prove book.txt --from-start"),
)
@click.argument("ref")
@click.option("--from-start", is_flag=True, help="Read from the start, and compare every snapshot on the way.")
@click.pass_obj
def prove(settings: GlobalOptions, /, ref: str, from_start: bool) -> None:
    """Read the kept text again, from the exact snapshot before REF, and say whether the state is equal bit for bit.

    Ends with 12 where it is not, or with 13 where it was made under other numerics, as on another processor, which
    are named.
    """
    from rwkv_stream.reading.prove import prove as read_again

    store, snapshot, model = settings.named(ref)
    proof = read_again(snapshot, model=model, store=store, from_start=from_start)
    if settings.json:
        console.emit_json(asdict(proof))
    else:
        read = f"read again from token {proof.from_token:,} to {proof.to_token:,}"
        checked = f"{console.counted(proof.checked, 'snapshot')} compared"
        verdict = "equal, bit for bit" if proof.equal else f"equal up to token {proof.same_up_to:,}, then not"
        click.echo(f"{read}, {checked}: {verdict}")
    if proof.differs is None:
        return
    identity, token = proof.differs
    by = "" if proof.largest is None else f", a value by {proof.largest:.2g}"
    differing = (
        f"proving snapshot {snapshot.id[:12]}: expected the stored states, found {identity[:12]} at token {token}"
    )
    if proof.numerics:
        raise MismatchError(
            f"{differing} to differ{by}, made under other numerics ({', '.join(proof.numerics)}); prove it where it "
            "was made, or with its --backend, --dtype and --threads"
        )
    raise SnapshotError(f"{differing} to differ{by}, under the same numerics; read the document again with --restart")


@command.command(
    name="export",
    epilog=example(
        "rwkv-stream snapshots export book.txt -o book.snapshots",
        "rwkv-stream snapshots export book.txt@50% --only -o half.snapshots",
    ),
)
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="FILE", help="Where to; - is stdout.")
@click.option("--only", is_flag=True, help="Without the snapshots before them.")
@click.option("--no-text", is_flag=True, help="Without the text that they have read.")
@click.pass_obj
def export(settings: GlobalOptions, /, refs: tuple[str, ...], output: str, only: bool, no_text: bool) -> None:
    """Write the snapshots that the REFs name, with those before them, as one file for another store."""
    from rwkv_stream.files import publishing

    store = settings.open_store()
    with contextlib.ExitStack() as stack:
        file: Any = sys.stdout.buffer if output == "-" else stack.enter_context(publishing(Path(output)))
        report = store.export(refs, file, only=only, keep_text=not no_text)
    if settings.json and output != "-":
        console.emit_json(asdict(report))
    settings.notice(f"{report.snapshots} snapshots, {console.size(report.bytes)}")


@command.command(name="import", epilog=example("rwkv-stream snapshots import book.snapshots"))
@click.argument("file", metavar="FILE", type=click.File("rb"))
@WAIT
@click.pass_obj
def import_(settings: GlobalOptions, /, file: BinaryIO, wait: bool) -> None:
    """Take over the snapshots of an exported FILE (- is stdin), all of them checked first."""
    report = settings.open_store(create=True, wait=wait).import_(file)
    if settings.json:
        console.emit_json(asdict(report))
        return
    _emit_taken(settings, report, "the import")
    settings.notice(f"{report.added} snapshots added, {report.known} were there")


@command.command(
    name="push",
    epilog=example(
        "rwkv-stream snapshots push s3://bucket/books.store",
        "rwkv-stream snapshots push /mnt/backup/books.store book.txt@50%",
    ),
)
@click.argument("url")
@click.argument("refs", metavar="[REF]...", nargs=-1)
@click.option("--force", is_flag=True, help="Move heads and tags there to where they stand here, whatever stood there.")
@WAIT
@click.pass_obj
def push(settings: GlobalOptions, /, url: str, refs: tuple[str, ...], force: bool, wait: bool) -> None:
    """Send the snapshots that the REFs name, or all, with what they go on from, to the store at URL.

    URL is any that fsspec opens (s3://BUCKET/PATH, gs://, sftp://, …), or the path of a folder. What is there already
    is not sent; stopped, it goes on where it was. A head there that this store's does not go on from stays where it is:
    exit 3.
    """
    store = settings.open_store(wait=wait)
    with console.bytes_bar(settings, "pushing") as show:
        report = store.push(url, refs, force=force, on_progress=show)
    if settings.json:
        console.emit_json(asdict(report))
    else:
        for name in (*report.heads, *report.tags):
            click.echo(name)
        for name in report.further:
            settings.notice(f"'{name}' is further there; `snapshots pull` brings it")
        settings.notice(_moved("sent", report))
    if report.refused:
        for name in report.refused:
            console.error(
                f"pushing '{name}': expected it there where this one goes on from, found it elsewhere; pull first, or "
                "--force"
            )
        raise PartialFailureError(f"{console.counted(len(report.refused), 'name')} refused; the rest is there")


@command.command(
    name="pull",
    epilog=example(
        "rwkv-stream snapshots pull s3://bucket/books.store",
        "rwkv-stream snapshots pull s3://bucket/books.store book.txt@50%",
    ),
)
@click.argument("url")
@click.argument("refs", metavar="[REF]...", nargs=-1)
@WAIT
@click.pass_obj
def pull(settings: GlobalOptions, /, url: str, refs: tuple[str, ...], wait: bool) -> None:
    """Take over the snapshots that the REFs name in the store at URL, or all, with what they go on from.

    What is here already is not fetched; stopped, it goes on where it was. Every file is checked on arrival.
    """
    _pull(settings, settings.open_store(create=True, wait=wait), url, refs)


@command.command(name="clone", epilog=example("rwkv-stream snapshots clone s3://bucket/books.store books.store"))
@click.argument("url")
@click.argument("folder", metavar="DIR")
@click.pass_obj
def clone(settings: GlobalOptions, /, url: str, folder: str) -> None:
    """Make a new store in DIR with all that the store at URL has. Stopped, it goes on with the same command."""
    from rwkv_stream.store import Store

    store = Store(folder, create=True)
    if any(store.heads()) or any(store.tags()):
        raise UsageError(
            f"cloning to '{folder}': expected no store, or an empty one, found snapshots; "
            f"`rwkv-stream snapshots pull --store '{folder}'` brings what is missing"
        )
    _pull(settings, store, url, ())


def _pull(settings: GlobalOptions, store: Store, url: str, refs: Sequence[str]) -> None:
    with console.bytes_bar(settings, "pulling") as show:
        report = store.pull(url, refs, on_progress=show)
    if settings.json:
        console.emit_json(asdict(report))
        return
    _emit_taken(settings, report, "the remote")
    settings.notice(_moved("fetched", report))


def _emit_taken(settings: GlobalOptions, report: Imported, where: str) -> None:
    """The names that another store gave to this one."""
    for name in (*report.heads, *report.tags):
        click.echo(name)
    for name in report.kept:
        settings.notice(f"'{name}' stays where it stands in this store; the snapshots of {where} are there by id")


def _moved(how: str, report: Pushed | Pulled) -> str:
    """What an exchange of snapshots did, in words."""
    what = f"{console.counted(report.files, 'file')}, {console.size(report.bytes)} {how}"
    return f"{report.added:,} snapshots added, {report.known:,} were there; {what}"
