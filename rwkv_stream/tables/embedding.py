"""How vectors are made of documents, as one value: the command line makes it, Python gives it, a job keeps to it."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rwkv_stream.errors import MismatchError, UsageError
from rwkv_stream.text.chunker import CHUNK_TOKENS
from rwkv_stream.text.units import Failure, Piece, Source, check_kinds, read

if TYPE_CHECKING:
    from rwkv_stream.model import Model
    from rwkv_stream.model.heads import VectorHead
    from rwkv_stream.model.state import State
    from rwkv_stream.store import Snapshot
    from rwkv_stream.tables.whitening import Whitening
    from rwkv_stream.text.tokenizer import Tokenizer

POOLINGS = ("auto", "head", "mean", "last")
HEAD = "head "  # begins the name of the pooling by a certain head, whose digest follows
DIGEST = 16  # hexadecimal digits of it
BUDGET = 1024  # tokens of a model call
BUDGET_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a vector stands for, and how it is made.

    units      what rows stand for: sentence, chunk, document, or several of these; as words or with commas between
    pooling    mean or last: of the last layer's hidden states, after ln_out, their mean, or that of the last token;
               head: by the vector head beside the checkpoint (`model.heads`); auto: by it where there is one, else mean
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
    pooling: str = "auto"
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
        if self.pooling not in POOLINGS and not self.pooling.startswith(HEAD):
            raise UsageError(f"embedding: expected pooling {', '.join(POOLINGS)}, found '{self.pooling}'")
        if self.budget < 1 or self.budget % BUDGET_MULTIPLE:
            raise UsageError(
                f"embedding: expected a budget that is a multiple of {BUDGET_MULTIPLE}, found {self.budget}"
            )
        if self.whitening is not None and not self.normalize:
            raise UsageError("whitening: expected vectors of length 1, found normalize=False; leave it out")

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

    def resolved(self, model: Model) -> tuple[Embedding, VectorHead | None]:
        """The same with the pooling that a model has for it, by its full name, and the head that it needs.

        Raises UsageError where a head is asked for and the model has none, MismatchError where it has another.
        """
        if self.pooling in ("mean", "last"):
            return self, None
        from rwkv_stream.model.heads import vector_head

        head = vector_head(model)
        if head is None:
            if self.pooling == "auto":
                return replace(self, pooling="mean"), None
            raise UsageError(
                f"embedding by a head: expected one beside '{model.path}', found none; make it with "
                "`rwkv-stream finetune --head vector`, or pass --pooling mean"
            )
        name = HEAD + head.digest[:DIGEST]
        if self.pooling not in ("auto", "head", name):
            raise MismatchError(
                f"embedding: expected the head {self.pooling.removeprefix(HEAD)} beside '{model.path}', found "
                f"{name.removeprefix(HEAD)}; what was made by the first cannot be compared or gone on with"
            )
        return replace(self, pooling=name), head
