"""The texts that a snapshot has read: as the store kept them, else read again where the document is still the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rwkv_stream.errors import InputError, UsageError

if TYPE_CHECKING:
    from rwkv_stream.store import Snapshot, Store
    from rwkv_stream.store.texts import KeptText


@contextlib.contextmanager
def text_of(snapshot: Snapshot, store: Store) -> Iterator[KeptText]:
    """The text of the document that a snapshot is of, up to there, while this context lasts.

    Where the store kept none the document is read again, into a temporary folder.
    raises  InputError where the document is not to be had any more, SnapshotError for a damaged text
    """
    kept = store.text(snapshot)
    if kept is not None:
        yield kept
        return
    from rwkv_stream.reading.keeping import Keeping
    from rwkv_stream.reading.passes import HashedText
    from rwkv_stream.store import Store as TemporaryStore
    from rwkv_stream.text import readers

    with TemporaryDirectory(prefix="rwkv-stream-") as folder:
        store = TemporaryStore(folder, create=True)
        try:
            document = readers.document(snapshot.document, encoding=snapshot.encoding)
            with store.writing(), document.text() as text:
                keeping = Keeping(store, document, text)
                keeping.reach(replace(snapshot, text=None))
                is_same = HashedText(keeping.pieces()).holds(snapshot)
        except (InputError, UsageError) as error:
            raise _gone(snapshot, str(error)) from error
        if not is_same or keeping.name is None:
            raise _gone(snapshot, "it is another text now")
        read = store.text(replace(snapshot, text=keeping.name))
        assert read is not None
        yield read


def _gone(snapshot: Snapshot, why: str) -> InputError:
    return InputError(
        f"looking into the text of '{snapshot.document}': expected it in the store or where it was read, "
        f"found neither: {why}; read it again with `ingest`, or let the model answer from the state alone, with "
        "--strategy state or --style generate"
    )
