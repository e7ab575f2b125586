"""The text in which things are hidden: as tokens, without end, and where its sentences end.

A text that is shorter than what is asked for begins again. Memory holds its tokens once, 4 bytes each, and of a long
text the first HAYSTACK_BYTES alone.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers import document

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rwkv_stream.text.tokenizer import Tokenizer

HAYSTACK_BYTES = 16 << 20
SENTENCE_TOKENS = 256  # what has no end of a sentence for so long is cut anywhere
STORY = "story.txt"  # in this package: that of `samples/`
_ENDS = re.compile(  # of sentences, in UTF-8: . ! ? … before white space, those of Chinese and Japanese anywhere
    rb"(?:[.!?]|\xe2\x80\xa6)(?:[\"')\]]|\xe2\x80[\x99\x9d]|\xc2\xbb)*(?=\s)|\n|\xe3\x80\x82|\xef\xbc[\x81\x9f]"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Haystack:
    """A text as tokens, which goes on for ever.

    name    of its source
    digest  SHA-256 of the text
    ids     int32 [n], its tokens
    ends    int64, rising: after how many tokens a sentence ends; 0 is the first
    """

    name: str
    digest: str
    ids: NDArray[np.int32] = field(repr=False)
    ends: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, name: str, pieces: Iterable[bytes], tokenizer: Tokenizer) -> Haystack:
        """That of a text in pieces. Raises InputError for one without a token."""
        text = b"".join(_first(name, pieces))
        if text and not text.endswith(b"\n"):
            text += b"\n"  # so that it may begin again
        blocks = list(tokenizer.stream([text]))
        if not blocks:
            raise InputError(f"taking '{name}' as the haystack: expected some text, found none")
        ids, ends = (np.concatenate([getattr(block, part) for block in blocks]) for part in ("ids", "ends"))
        sentences = np.fromiter((found.end() for found in _ENDS.finditer(text)), np.int64)
        is_end = np.isin(ends, sentences)
        return cls(name, hashlib.sha256(text).hexdigest(), ids, np.r_[0, np.flatnonzero(is_end) + 1])

    @classmethod
    def read(cls, source: str | None, tokenizer: Tokenizer) -> Haystack:
        """That of a source that `readers` reads; of None the packaged story. Raises InputError as readers do."""
        if source is None:
            return cls.of(STORY, [files(__package__).joinpath(STORY).read_bytes()], tokenizer)
        with document(source).text() as text:
            return cls.of(source, text, tokenizer)

    def tokens(self, begin: int, end: int) -> NDArray[np.int64]:
        """Those from `begin` to `end` of the endless text: int64 [end - begin]."""
        return self.ids.take(np.arange(begin, end), mode="wrap").astype(np.int64)

    def sentence_end(self, position: int) -> int:
        """The last end of a sentence at or before a position; the position itself where that is far."""
        turn, at = divmod(position, len(self.ids))
        end = int(self.ends[np.searchsorted(self.ends, at, "right") - 1]) + turn * len(self.ids)
        return end if position - end <= SENTENCE_TOKENS else position


def _first(name: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    n_bytes = 0
    for piece in pieces:
        if n_bytes + len(piece) > HAYSTACK_BYTES:
            log.warning("'%s': only its first %d MiB are the haystack, again and again", name, HAYSTACK_BYTES >> 20)
            yield piece[: HAYSTACK_BYTES - n_bytes].decode(errors="ignore").encode()
            return
        n_bytes += len(piece)
        yield piece
