"""How vectors are made of documents, as one value: the command line makes it, Python gives it, a job keeps to it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwkv_stream.errors import UsageError
from rwkv_stream.text.chunker import CHUNK_TOKENS
from rwkv_stream.text.units import Failure, Piece, Source, check_kinds, read

if TYPE_CHECKING:
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot
    from rwkv_stream.tables.whitening import Whitening
    from rwkv_stream.text.tokenizer import Tokenizer

POOLINGS = ("mean", "last")
BUDGET = 1024  # tokens of a model call
BUDGET_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a vector stands for, and how it is made.

    units      what rows stand for: sentence, chunk, document, or several of these; as words or with commas between
    pooling    of the last layer's hidden states, after ln_out: their mean, or that of the last token
    isolated   every unit is a reading of its own; for one kind of unit alone
    chunk      tokens of the unit chunk
    budget     tokens of a model call, a multiple of BUDGET_MULTIPLE
    normalize  give vectors the length 1
    language   of the sentences, an ISO 639-1 code; of an unknown one no abbreviations are known
    text       give the text of sentences and chunks
    start      every document is read as going on from this state (batch 1)
    whitening  applied to vectors of length 1, which it leaves so
    raises     UsageError for values that make no sense, whatever model it is
    """

    units: Sequence[str] = ("document",)
    pooling: str = "mean"
    isolated: bool = False
    chunk: int = CHUNK_TOKENS
    budget: int = BUDGET
    normalize: bool = True
    language: str = "en"
    text: bool = True
    start: Snapshot | State | None = None
    whitening: Whitening | None = None

    def __post_init__(self) -> None:
        kinds = self.units.split(",") if isinstance(self.units, str) else self.units
        object.__setattr__(self, "units", tuple(kinds))
        for name in ("chunk", "budget"):
            if not isinstance(getattr(self, name), int):
                raise UsageError(f"embedding: expected {name} as a whole number, found {getattr(self, name)!r}")
        check_kinds(self.units, self.chunk, self.isolated)
        if self.pooling not in POOLINGS:
            raise UsageError(f"embedding: expected pooling {' or '.join(POOLINGS)}, found '{self.pooling}'")
        if self.budget < 1 or self.budget % BUDGET_MULTIPLE:
            raise UsageError(
                f"embedding: expected a budget that is a multiple of {BUDGET_MULTIPLE}, found {self.budget}"
            )
        if self.whitening is not None and not self.normalize:
            raise UsageError("whitening: it takes and gives vectors of length 1; leave them normalised")

    def pieces(self, documents: Iterable[Source], tokenizer: Tokenizer) -> Generator[Piece | Failure, None, None]:
        """The documents as `text.units` cuts them."""
        return read(
            documents,
            tokenizer,
            kinds=self.units,
            chunk=self.chunk,
            isolated=self.isolated,
            language=self.language,
            text=self.text,
        )
