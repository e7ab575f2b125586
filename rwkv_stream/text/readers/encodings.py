"""Encodings: bytes as UTF-8, decided once, undecodable bytes replaced and counted.

* The encoding is decided from the first 64 KiB: a byte order mark; what a page or its server declares, where its bytes
  are not UTF-8; UTF-8 where they are mostly that (a character cut at their end is); else by `chardet`, from what is
  text: lines with control characters and NULs are garbage in a log.
* Labels of pages mean what browsers take them for (the WHATWG's table, by `webencodings`).
* A byte order mark is dropped, CRLF and NUL stay, each undecodable byte becomes one U+FFFD and is counted.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

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
_DECLARED = re.compile(
    rb"""(?:<meta\s[^>]*?charset|^\s*<\?xml\s[^>]*?encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE
)
_DECLARED_BYTES = 4096
_ERRORS = "rwkv_stream.surrogate"
_ESCAPES = re.compile(rb"\x1b\$|\x1b\([BJI]|~\{")  # of ISO-2022 and HZ, which look like ASCII
_HOLE = re.compile(rb"\0{16,}")  # where a log was cut while it was written
_GARBAGE = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")
GOOD_PER_BAD = 2  # bytes of whole characters of several, to an undecodable byte, of what is UTF-8 all the same
UNSURE = 0.06  # below this confidence a guess is worth less than that most texts in few such bytes are Western
_LIKELY = (  # what texts are found in; others only win where there is nothing to tell them by
    *(f"cp125{i}" for i in range(9)),
    *(f"iso8859-{i}" for i in (1, 2, 4, 5, 6, 7, 8, 9, 13, 15)),
    *("koi8-r", "koi8-u", "cp866", "cp855", "cp437", "cp850", "cp852", "mac-roman", "mac-cyrillic", "cp874", "tis-620"),
    *("cp932", "shift_jis_2004", "euc_jis_2004", "iso2022_jp_2", "iso2022_jp_2004", "iso2022_jp_ext", "iso2022_kr"),
    *("gb18030", "hz", "big5hkscs", "cp949", "euc_kr", "johab"),
)
_WIDER = {  # what browsers read under a name, and what holds all that it does
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}


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


class Decision(NamedTuple):
    """An encoding, and how it was found.

    source  "named", "byte order mark", "declared", "valid UTF-8" (mostly valid counts), "ASCII" or "guess"
    """

    name: str
    source: str


def decided(sample: bytes, named: str | None, label: str | None = None) -> Decision | None:
    """The encoding of a text that begins so: the one that is named, else the likeliest; None where this is no text.

    label  what a page, or its server, says
    """
    mark = next((encoding for bom, encoding in _BOMS if sample.startswith(bom)), None)
    if named == "utf-8-sig":
        return Decision("utf-8", "named")
    if named in ("utf-16", "utf-32"):
        return Decision(mark if mark and mark.startswith(named) else f"{named}-le", "named")
    if named is not None:
        return Decision(named, "named")
    if mark is not None:
        found, text = Decision(mark, "byte order mark"), decoded(sample, mark)
    else:
        clean = _clean(sample)
        if clean is None:
            return None
        found = _guessed(clean, web_codec(label) if label else None)
        text = decoded(clean, found.name)
    n_odd = len(_CONTROL.findall(text)) + len(_SURROGATE.findall(text))
    return found if n_odd <= max(32, 0.3 * len(text)) else None


def decoded(sample: bytes, encoding: str) -> str:
    """The sample as text, a lone surrogate for each undecodable byte; a character cut at its end is left out."""
    return codecs.getincrementaldecoder(encoding)(_ERRORS).decode(sample)


def is_hole(sample: bytes) -> bool:
    """Whether nothing has been written so far: what comes behind it is to be looked at."""
    return len(sample) > 32 and not sample.strip(b"\0")


def _clean(sample: bytes) -> bytes | None:
    """What of a sample tells its encoding: without holes, and where it is not UTF-8 without lines of garbage; None
    where these are most of it."""
    if is_hole(sample):
        return None
    held = _HOLE.sub(b"", sample) or sample
    if b"\0" not in held or not _SURROGATE.search(decoded(held, "utf-8")):
        return held
    clean = b"".join(line for line in held.splitlines(keepends=True) if not _GARBAGE.search(line))
    return clean if len(clean) > len(held) // 2 else None


def _guessed(sample: bytes, declared: str | None) -> Decision:
    """The encoding of a text that begins so, without a byte order mark."""
    text = decoded(sample, "utf-8")
    n_bad = len(_SURROGATE.findall(text))
    if declared is not None and (n_bad or text.isascii()):
        n_wrong = len(_SURROGATE.findall(decoded(sample, declared)))
        if n_wrong <= n_bad // 2:
            return Decision(declared, "declared")
    if text.isascii() and not _ESCAPES.search(sample):
        return Decision("utf-8", "ASCII")
    n_good = len(sample) - n_bad - sum(map(str.isascii, text))
    if n_good and n_good >= GOOD_PER_BAD * n_bad:
        return Decision("utf-8", "valid UTF-8")
    import chardet

    found = chardet.detect(sample, compat_names=False, include_encodings=_LIKELY, no_match_encoding="cp1252")
    name = codecs.lookup(found["encoding"] or "cp1252").name
    if text.isascii() and not name.startswith(("iso2022", "hz")):
        return Decision("utf-8", "ASCII")
    if found["confidence"] < UNSURE and not _SURROGATE.search(decoded(sample, "cp1252")):
        name = "cp1252"
    wider = _WIDER.get(name, name)
    n_lost, n_lost_wider = (len(_SURROGATE.findall(decoded(sample, encoding))) for encoding in (name, wider))
    return Decision(wider if n_lost_wider <= n_lost else name, "guess")


def declared(sample: bytes) -> str | None:
    """What a page of HTML or XML says of its encoding."""
    found = _DECLARED.search(sample, 0, _DECLARED_BYTES)
    return found[1].decode("latin-1") if found is not None else None


def web_codec(label: str) -> str | None:
    """Python's name of an encoding that a page or its server declares, as browsers understand it; None where the bytes
    themselves are to tell."""
    import webencodings

    known = webencodings.lookup(label)
    if known is not None and known.name == "x-user-defined":
        return None
    try:  # what browsers do not know, or refuse to read, Python may
        name = codec(label if known is None or known.name == "replacement" else known.codec_info.name)
    except UsageError:
        return None
    if name.startswith("utf"):  # wider ones could not be read so far, and UTF-8 is seen from the bytes
        return None
    return _WIDER.get(name, name)
