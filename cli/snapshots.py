"""`rwkv-stream snapshots`: look after the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from rwkv_stream.cli import console
from rwkv_stream.cli.options import Group, Settings, example
from rwkv_stream.errors import SnapshotError

if TYPE_CHECKING:
    from rwkv_stream.store import Snapshot


@click.group(
    cls=Group, name="snapshots", epilog=example("rwkv-stream snapshots list", "rwkv-stream snapshots show book.txt@50%")
)
def command() -> None:
    """Look after the snapshots of a store."""


@command.command(
    name="list", epilog=example("rwkv-stream snapshots list book.txt", "rwkv-stream snapshots list --json")
)
@click.argument("document", required=False)
@click.pass_obj
def list_(settings: Settings, /, document: str | None) -> None:
    """List the snapshots, of one DOCUMENT or all, oldest first."""
    console.listen(settings)
    store = settings.open_store()
    found = store.list(document=document)
    if settings.json:
        for snapshot in found:
            console.emit_json(_listed(snapshot))
        return
    console.emit_table(
        ("id", "document", "tokens", "text", "size", "parent", "created", "model", ""),
        (
            (
                s.id[:12],
                s.document,
                f"{s.tokens}",
                console.size(s.bytes),
                console.size(s.size_bytes),
                (s.parent or "-")[:12],
                s.created,
                s.model[:8],
                "leaf" if s.leaf else "",
            )
            for s in found
        ),
    )


def _listed(snapshot: Snapshot) -> dict[str, Any]:
    names = ("id", "document", "tokens", "bytes", "size_bytes", "parent", "created", "model", "leaf")
    return {name: getattr(snapshot, name) for name in names}


@command.command(name="show", epilog=example("rwkv-stream snapshots show book.txt@65536"))
@click.argument("ref")
@click.pass_obj
def show(settings: Settings, /, ref: str) -> None:
    """Show all that is recorded of the snapshot that REF names."""
    console.listen(settings)
    snapshot = settings.open_store().get(ref)
    facts = snapshot.facts()
    if settings.json:
        console.emit_json(facts)
    else:
        console.emit_table(("field", "value"), ((name, str(value)) for name, value in facts.items()))


@command.command(name="tree", epilog=example("rwkv-stream snapshots tree book.txt"))
@click.argument("document", required=False)
@click.pass_obj
def tree(settings: Settings, /, document: str | None) -> None:
    """Show the lineage of the snapshots: parents, forks, tags and heads."""
    console.listen(settings)
    store = settings.open_store()
    names: dict[str, list[str]] = {}
    for tag, snapshot_id in store.tags():
        names.setdefault(snapshot_id, []).append(tag)
    for line in _tree_lines(list(store.list(document=document)), names):
        click.echo(line)


def _tree_lines(snapshots: list[Snapshot], tags: dict[str, list[str]]) -> Iterator[str]:
    """One line a snapshot; children of one parent are indented only where the line forks."""
    by_id = {snapshot.id: snapshot for snapshot in snapshots}
    children: dict[str | None, list[Snapshot]] = {}
    for snapshot in snapshots:
        origin = snapshot.parent or snapshot.start
        children.setdefault(origin if origin in by_id else None, []).append(snapshot)
    stack = [(root, 0) for root in reversed(children.get(None, []))]
    while stack:
        snapshot, depth = stack.pop()
        labels = "".join(f" [{tag}]" for tag in tags.get(snapshot.id, []))
        leaf = " leaf" if snapshot.leaf else ""
        yield f"{'  ' * depth}{snapshot.id[:12]} {snapshot.document}@{snapshot.tokens}{leaf}{labels}"
        below = children.get(snapshot.id, [])
        deeper = depth + (len(below) > 1 or (bool(below) and below[0].parent is None))
        stack.extend((child, deeper) for child in reversed(below))


@command.command(
    name="tag",
    epilog=example("rwkv-stream snapshots tag book.txt@50% halfway", "rwkv-stream snapshots tag --delete halfway"),
)
@click.argument("ref")
@click.argument("name", required=False)
@click.option("--delete", is_flag=True, help="Remove the tag REF.")
@click.pass_obj
def tag(settings: Settings, /, ref: str, name: str | None, delete: bool) -> None:
    """Give the snapshot that REF names the tag NAME."""
    console.listen(settings)
    if delete == (name is not None):
        raise click.UsageError("tag takes REF NAME, or --delete TAG")
    store = settings.open_store()
    with store.writing():
        if delete:
            store.untag(ref)
        else:
            assert name is not None
            snapshot = store.get(ref)
            store.tag(name, snapshot.id)
            click.echo(snapshot.id)


@command.command(name="rm", epilog=example("rwkv-stream snapshots rm book.txt@16384"))
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.pass_obj
def rm(settings: Settings, /, refs: tuple[str, ...]) -> None:
    """Remove the snapshots that the REFs name; the others stay as they are."""
    console.listen(settings)
    store = settings.open_store()
    with store.writing():
        for snapshot in [store.get(ref) for ref in refs]:
            store.rm(snapshot.id)
            click.echo(snapshot.id)


@command.command(name="verify", epilog=example("rwkv-stream snapshots verify"))
@click.pass_obj
def verify(settings: Settings, /) -> None:
    """Check every record, reference and object against its name and checksums, and the catalog against them."""
    console.listen(settings)
    report = settings.open_store().verify()
    if settings.json:
        console.emit_json(asdict(report))
    else:
        for damage in report.damaged:
            click.echo(f"{damage.path}\t{damage.reason}")
        console.say(settings, f"checked {report.checked} files: {len(report.damaged) or 'nothing'} damaged")
    if report.damaged:
        raise SnapshotError(
            f"verifying '{settings.store_path}': expected every file whole, found {len(report.damaged)} damaged"
        )


@command.command(name="rebuild", epilog=example("rwkv-stream snapshots rebuild"))
@click.pass_obj
def rebuild(settings: Settings, /) -> None:
    """Make the catalog anew from the records and references."""
    console.listen(settings)
    count = settings.open_store().rebuild()
    console.say(settings, f"catalog rebuilt from {count} records")
