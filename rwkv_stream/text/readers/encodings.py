"""Encodings: bytes as UTF-8, decided once, undecodable bytes replaced and counted.

* The encoding is decided from the first 64 KiB: a byte order mark; what an HTML page declares, where its bytes are not
  UTF-8; UTF-8 where they are valid (a character cut at their end is), or where at least ten whole characters stand
  against each undecodable byte; else `charset-normalizer`.
* A byte order mark is dropped, CRLF and NUL stay, each undecodable byte becomes one U+FFFD and is counted.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator

from rwkv_stream.errors import UsageError
from rwkv_stream.text.readers.streams import READ_BYTES

SAMPLE_BYTES = 65_536  # the encoding is decided from these

_BOMS = [  # UTF-32 first: its mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
_CONTROL = re.compile("[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")  # not backspace, white space and escape, which logs hold
_SURROGATE = re.compile("[\ud800-\udfff]")
_DECLARED = re.compile(rb"""<meta\s[^>]*?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_DECLARED_BYTES = 4096
_ERRORS = "rwkv_stream.surrogate"


def _surrogates(error: UnicodeError) -> tuple[str, int]:
    """A codec error handler: one lone surrogate, which no text holds, for each undecodable byte."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_ERRORS, _surrogates)


class Decoded:
    """The UTF-8 pieces of bytes in some encoding, on character edges; `replaced_bytes` so far."""

    def __init__(self, read: Callable[[int], bytes], encoding: str) -> None:
        self.replaced_bytes = 0
        self._read = read
        self._decoder = codecs.getincrementaldecoder(encoding)(_ERRORS)
        self._is_start = True
        self._is_end = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while not self._is_end:
            data = self._read(READ_BYTES)
            self._is_end = not data
            text = self._decoder.decode(data, final=self._is_end)
            if self._is_start:
                text = text.removeprefix("\ufeff")
                self._is_start = False
            if text:
                piece, n_replaced = utf8(text)
                self.replaced_bytes += n_replaced
                return piece
        raise StopIteration


def utf8(text: str) -> tuple[bytes, int]:
    """A text as UTF-8, a replacement for each lone surrogate, and how many these were."""
    try:
        return text.encode(), 0
    except UnicodeEncodeError:
        text, n_replaced = _SURROGATE.subn("\ufffd", text)
        return text.encode(), n_replaced


def codec(encoding: str) -> str:
    """Python's name of an encoding of text; raises UsageError."""
    try:
        b"a".decode(encoding, _ERRORS)
        name = codecs.lookup(encoding).name
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"decoding text: expected the name of an encoding, found '{encoding}'; "
            "pass one such as utf-8, cp1252 or shift_jis"
        ) from error
    return name


def decided(sample: bytes, named: str | None, is_html: bool = False) -> str | None:
    """The encoding of a text that begins so: the one that is named, else the likeliest; None where this is no text."""
    mark = next((encoding for bom, encoding in _BOMS if sample.startswith(bom)), None)
    if named == "utf-8-sig":
        return "utf-8"
    if named in ("utf-16", "utf-32"):
        return mark if mark and mark.startswith(named) else f"{named}-le"
    if named is not None:
        return named
    encoding = mark or _guessed(sample, _declared(sample) if is_html else None)
    if encoding is None:
        return None
    text = decoded(sample, encoding)
    n_odd = len(_CONTROL.findall(text)) + len(_SURROGATE.findall(text))
    return encoding if n_odd <= max(32, 0.3 * len(text)) else None


def decoded(sample: bytes, encoding: str) -> str:
    """The sample as text, a lone surrogate for each undecodable byte; a character cut at its end is left out."""
    return codecs.getincrementaldecoder(encoding)(_ERRORS).decode(sample)


def _guessed(sample: bytes, declared: str | None) -> str | None:
    """The encoding of a text that begins so, without a byte order mark; None where it has none."""
    text = decoded(sample, "utf-8")
    n_bad = len(_SURROGATE.findall(text))
    if declared is not None and (n_bad or text.isascii()):
        return declared
    n_good = sum(not character.isascii() for character in text) - n_bad if n_bad else 0
    if n_good >= 10 * n_bad:
        return "utf-8"
    if b"\0" in sample:
        return None
    import charset_normalizer

    # The library refuses an encoding in which the sample ends within a character: end it after a byte that is no part
    # of a larger character in any.
    end = max(map(sample.rfind, (b"\n", b" ", b"\r", b"\t", b",", b"."))) + 1
    matches = charset_normalizer.from_bytes(sample[:end] if end > len(sample) // 2 else sample)
    best = matches.best()
    if best is None:
        return None
    # The library takes the first of equals, in the order of names; Western European is the likeliest of them.
    is_western = any("cp1252" in match.could_be_from_charset and match.coherence >= best.coherence for match in matches)
    return "cp1252" if is_western else codecs.lookup(best.encoding).name


def _declared(sample: bytes) -> str | None:
    """What an HTML page says of itself."""
    found = _DECLARED.search(sample, 0, _DECLARED_BYTES)
    return web_codec(found[1].decode("latin-1")) if found is not None else None


def web_codec(label: str) -> str | None:
    """Python's name of an encoding that a page or its server declares, as browsers understand it; None where the bytes
    themselves are to tell."""
    try:
        name = codec(label)
    except UsageError:
        return None
    if name.startswith("utf"):  # wider ones could not be read so far, and UTF-8 is seen from the bytes
        return None
    return "cp1252" if name in ("iso8859-1", "ascii") else name
