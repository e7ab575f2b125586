"""The options that every command takes, as one value, and what they open: a store, a model, the fork of a snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rwkv_stream.errors import MismatchError, SnapshotError, UsageError
from rwkv_stream.model.loading import Loading

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.store import Snapshot, Store

M = TypeVar("M")


@dataclass(slots=True)
class GlobalOptions:
    """The global options, and what they open; `given` are those that are fields of `Loading`.

    nearest, cache_size  of `position_options`
    taken                the snapshot that a REF named, and what it cost, for JSON; empty before
    """

    store: str | None = None
    model: str | None = None
    given: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    verbose: int = 0
    json: bool = False
    nearest: bool = False
    cache_size: int | None = None
    taken: dict[str, Any] = field(default_factory=dict)

    @property
    def store_path(self) -> Path:
        if self.store is not None:
            return Path(self.store)
        from platformdirs import user_data_path

        return user_data_path("rwkv-stream") / "store"

    def open_store(self, *, create: bool = False, wait: bool = False) -> Store:
        from rwkv_stream.store import Store

        return Store(self.store_path, create=create, wait=wait)

    def load_model(self, path: str | None = None) -> Model:
        """The model of `--model`, else `path`, else the shipped one."""
        from rwkv_stream.model import load
        from rwkv_stream.model.checkpoints.library import find

        return load(replace(self.loading, path=find(self.model) if self.model else path))

    def model_fingerprint(self) -> str:
        """Of the model of `--model`, which is not loaded for it; nor is torch, where the fingerprint is remembered."""
        from rwkv_stream.model.checkpoints import fingerprints
        from rwkv_stream.model.checkpoints.library import find
        from rwkv_stream.text.tokenizer import find as find_tokenizer

        assert self.model is not None
        path, loading = find(self.model), self.loading
        facts = None if loading.lora or loading.initial_state else fingerprints.known(path)
        if facts is not None and not facts.has_tokenizer:
            return facts.fingerprint(find_tokenizer(loading.tokenizer, path.absolute(), facts.vocab_size, {}).id)
        from rwkv_stream.model.loader import fingerprint_of

        return fingerprint_of(replace(loading, path=path))

    @property
    def loading(self) -> Loading:
        """How to load a model, whichever it is."""
        return Loading(**self.given)

    @property
    def _adapters(self) -> str:
        """For a message: those that were given."""
        names = {"lora": "--lora", "initial_state": "--initial-state"}
        given = [f"{option} '{self.given[name]}'" for name, option in names.items() if name in self.given]
        return f"with {' and '.join(given)}" if given else "without --lora or --initial-state"

    def notice(self, message: str) -> None:
        """Show a line to the person at the terminal."""
        if not self.quiet:
            click.echo(message, err=True)

    def check_reference(self, store: Store, ref: str) -> None:
        """Raise NotFoundError for a REF that names nothing, whatever model is loaded then; that takes far longer."""
        with contextlib.suppress(UsageError, SnapshotError, MismatchError):  # which may depend on the model
            store.locate(ref)

    def snapshot(self, ref: str) -> tuple[Store, Snapshot]:
        """The store, and the snapshot that REF names; no model is loaded for it."""
        store, model = self._asked(ref, self.model_fingerprint)
        return store, self.nearest_to(store, ref, model)

    def somewhere(self, ref: str) -> tuple[Store, Snapshot]:
        """The store, and a snapshot of the reading that REF names a position of, wherever that is."""
        store, model = self._asked(ref, self.model_fingerprint)
        return store, store.locate(ref, model=model).near

    def _asked(self, ref: str, of_model: Callable[[], M]) -> tuple[Store, M | None]:
        """The store, and what `of_model` gives of the model that was named, if one was, once REF is seen to name
        something."""
        store = self.open_store()
        if self.model is None:
            return store, None
        self.check_reference(store, ref)
        return store, of_model()

    def say_taken(self, snapshot: Snapshot, more: str = "") -> None:
        """Say which snapshot a REF named."""
        kept = ""
        if snapshot.keeps_state and not snapshot.is_kept_exactly:
            kept = f", kept as {snapshot.codec}: near what was read, not equal to it"
        self.notice(f"from snapshot {snapshot.id[:12]}, token {snapshot.tokens:,} of '{snapshot.document}'{kept}{more}")

    def fork(self, ref: str) -> tuple[Store, Snapshot, Model]:
        """As `named`, the state of the snapshot to be loaded."""
        store, model = self._asked(ref, self.load_model)
        found = store.locate(ref, model=None if model is None else model.fingerprint)
        model = model or self.model_of(found.near)
        return store, self.take(store, ref, model), model

    def take(self, store: Store, ref: str, model: Model) -> Snapshot:
        """The snapshot that REF names, at just that position, its state to be loaded; what was taken, and what that
        cost, is said."""
        from rwkv_stream.reading.positions import take

        taken = take(ref, model=model, store=store, nearest=self.nearest, cache_bytes=self.cache_size)
        cost = f"; {taken.tokens_read:,} tokens read for its state" if taken.tokens_read else ""
        why = f", as {taken.why}" if taken.why is not None else ""
        before = f"; the nearest before '{ref}'{why}" if taken.is_nearest else ""
        self.say_taken(taken.snapshot, before + cost)
        self.taken = {
            "taken": {
                "snapshot": taken.snapshot.id,
                "document": taken.snapshot.document,
                "tokens": taken.snapshot.tokens,
                "bytes": taken.snapshot.bytes,
                "tokens_read": taken.tokens_read,
                "nearest": taken.is_nearest,
                "exact": taken.snapshot.exact,
            }
        }
        return taken.snapshot

    def named(self, ref: str) -> tuple[Store, Snapshot, Model]:
        """The store, the snapshot that REF names or the nearest before, which is said, and the model that made it;
        MismatchError if it is not to be had."""
        store, model = self._asked(ref, self.load_model)
        snapshot = self.nearest_to(store, ref, None if model is None else model.fingerprint)
        self.say_taken(snapshot)
        return store, snapshot, model or self.model_of(snapshot)

    def nearest_to(self, store: Store, ref: str, model: str | None = None) -> Snapshot:
        """The snapshot that REF names, or the nearest before that position, which is said."""
        found = store.locate(ref, model=model)
        snapshot = found.snapshot or store.get(ref, model=model)  # which says that there is none
        if not found.is_there:
            self.notice(
                f"'{ref}': the nearest snapshot before is {snapshot.id[:12]}, token {snapshot.tokens:,}, "
                f"byte {snapshot.bytes:,}"
            )
        return snapshot

    def model_of(self, snapshot: Snapshot) -> Model:
        """The model that made a snapshot; MismatchError if it is not to be had."""
        path = snapshot.model_path if self.model is None and Path(snapshot.model_path).exists() else None
        model = self.load_model(path)
        if model.fingerprint != snapshot.model:
            advice = "pass --model with the first one"
            if path is not None:
                advice = "pass the --lora or --initial-state that it was made with, or --model if that file changed"
            raise MismatchError(
                f"using snapshot {snapshot.id[:12]}: expected its model {snapshot.model[:12]}, last seen at "
                f"'{snapshot.model_path}', "
                f"found {model.fingerprint[:12]} at '{model.path}' {self._adapters}; {advice}"
            )
        return model
