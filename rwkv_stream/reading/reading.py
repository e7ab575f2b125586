"""How a document is to be read, as one value: the command line makes it, Python gives it."""

from __future__ import annotations

from dataclasses import dataclass

from rwkv_stream.errors import UsageError
from rwkv_stream.store.retention import Rule
from rwkv_stream.text import edges

SNAPSHOT_EVERY_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Reading:
    """How a document is to be read.

    snapshot_every  tokens between snapshots, a multiple of `chunk`; None: 16,384, rounded down to one
    chunk           tokens per model call, T; None: the document's own, else 1,024
    restart         read from the start whatever the store has, and forget the document's T, start, encoding and edges
    from_snapshot   REF: start from that snapshot's state; None: from what the document started from, else the model's
    approximate     start from a snapshot's state even where that is kept in a codec that is not exact
    instruction     what is to be done with the document, read before it: it starts from that state
    max_tokens      stop after so many tokens of the document
    encoding        of the text; None: the document's own, else found out
    keep_text       keep the text beside the states
    snapshot_at     edges of the document at which there are snapshots, too: "chapter", "page", "heading", or a regular
                    expression for lines; None: those that the document has had them at
    keep            thin the past: so many snapshots stay for each doubling of the distance behind the newest; None: all
    max_store_size  bytes of the store, for which the past is thinned as far as that takes; None: no limit
    wait            for a locked store, instead of raising StoreLockedError
    raises          UsageError for values that make no sense, whatever the document
    """

    snapshot_every: int | None = None
    chunk: int | None = None
    restart: bool = False
    from_snapshot: str | None = None
    approximate: bool = False
    instruction: str | None = None
    max_tokens: int | None = None
    encoding: str | None = None
    keep_text: bool = True
    snapshot_at: str | None = None
    keep: int | None = None
    max_store_size: int | None = None
    wait: bool = False

    def __post_init__(self) -> None:
        for name in ("snapshot_every", "chunk", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"reading: expected {name} to be a number of tokens, 1 or more, found {value!r}")
        if self.instruction is not None and self.from_snapshot is not None:
            raise UsageError("reading: expected a document to start from a snapshot or an instruction, found both")
        _ = self.rule  # which looks at its own
        if self.snapshot_at is not None:
            edges.check(self.snapshot_at)
        if self.chunk is not None:
            self.interval(self.chunk)

    @property
    def rule(self) -> Rule:
        """What is to stay of the snapshots."""
        return Rule(self.keep, self.max_store_size)

    def interval(self, chunk: int) -> int:
        """Tokens between snapshots of a document that is read in chunks of `chunk`.

        raises  UsageError where those asked for are no multiple of it
        """
        if self.snapshot_every is None:
            return max(chunk, SNAPSHOT_EVERY_TOKENS // chunk * chunk)
        if self.snapshot_every % chunk:
            raise UsageError(
                f"reading: expected --snapshot-every to be a multiple of the chunk of {chunk} tokens, found "
                f"{self.snapshot_every}"
            )
        return self.snapshot_every
