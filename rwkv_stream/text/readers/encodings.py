"""Encodings: bytes as UTF-8, decided once, undecodable bytes replaced and counted.

* What decides it: a byte order mark; what a page or its server declares, where the bytes are not UTF-8; escape
  sequences, as of ISO-2022 and HZ; else the first 64 KiB that begin with the first byte over 127: UTF-8 where they are
  mostly that (a character cut at their end is), else what `chardet` guesses.
* Until then a text is "ascii", which whatever is decided goes on with: the same characters so far.
* Lines with control characters and NULs are garbage in a log, and decide nothing.
* Labels of pages mean what browsers take them for (the WHATWG's table, by `webencodings`).
* A byte order mark is dropped, CRLF and NUL stay, each undecodable byte becomes one U+FFFD and is counted.
"""

from __future__ import annotations

import codecs
import itertools
import logging
import re
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

from rwkv_stream.errors import UsageError
from rwkv_stream.text.readers import iso2022_cn
from rwkv_stream.text.readers.streams import READ_BYTES, read_up_to

log = logging.getLogger(__name__)

SAMPLE_BYTES = 65_536  # the encoding is decided from these
CONTEXT_BYTES = 128
MARK_BYTES = 4  # of the longest escape sequence

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
_DESIGNATION = re.compile(  # of ISO-2022-JP, -KR and -CN; a terminal's `ESC ( B` is none
    rb"\x1b\$(?:(?P<jp>[@AB]|\([@-DO-Q])|(?P<kr>\)C)|(?P<cn>\)[AEG]|\*H))|(?P<jp_>\x1b(?:\([IJ]|\.[AF]))"
)
_HZ = re.compile(rb"(?:[^~]|~[~\n]|~\{(?:[!-w][!-~])*(?:~\}|[!-w]?~?\Z))*~?\Z")
_TELLING = re.compile(rb"[\x80-\xff]|~|" + re.sub(rb"\?P<\w+>", b"?:", _DESIGNATION.pattern))
_TELLING_BUT_HZ = re.compile(_TELLING.pattern.replace(b"~|", b""))
_HIGH = re.compile(rb"[\x80-\xff]")
_MAY_TELL = re.compile(rb"(?:\x1b(?:[(.]|\$[()*]?)?|~)?\Z")  # where more is to come
_HOLE = re.compile(rb"\0{16,}")  # where a log was cut while it was written
_GARBAGE = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f]")
GOOD_PER_BAD = 2  # bytes of whole characters of several, to an undecodable byte, of what is UTF-8 all the same ...
SINGLE_GOOD_PER_BAD = 1  # ... where it would else be in an encoding of single bytes, which seldom look like these
FEW = 4  # control characters may stand in whatever text; more of them are less than a third of it
UNSURE = 0.06  # below this confidence a guess is worth less than that most texts in few such bytes are Western
_LIKELY = (  # what texts are found in; others only win where there is nothing to tell them by
    *(f"cp125{i}" for i in range(9)),
    *(f"iso8859-{i}" for i in (1, 2, 4, 5, 6, 7, 8, 9, 13, 15)),
    *("koi8-r", "koi8-u", "cp866", "cp855", "cp437", "cp850", "cp852", "mac-roman", "mac-cyrillic", "cp874", "tis-620"),
    *("cp932", "shift_jis_2004", "euc_jis_2004", "gb18030", "big5hkscs", "cp949", "euc_kr", "johab"),
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


class Decoded(Iterator[bytes]):
    """The UTF-8 pieces of bytes, on character edges; `replaced_bytes` and `decision` so far.

    What is ASCII so far is given as that; what comes then decides the encoding, which is said by `name`.
    """

    def __init__(self, read: Callable[[int], bytes], decision: Decision, name: str) -> None:
        self.replaced_bytes = 0
        self.decision = decision
        self._read, self._name = read, name
        self._pieces = self._decoded()
        self._say()

    def __next__(self) -> bytes:
        return next(self._pieces)

    def _say(self) -> None:
        level = logging.WARNING if self.decision.source == "guess" else logging.INFO
        log.log(level, "'%s': its encoding is taken for %s (%s)", self._name, *self.decision)

    def _decoded(self) -> Iterator[bytes]:
        head = b""
        is_start = self.decision != ASCII
        if not is_start:
            head = yield from self._ascii()
        decoder = incremental_decoder(self.decision.name)
        for data in itertools.chain([head] if head else [], iter(lambda: self._read(READ_BYTES), b""), [b""]):
            text = decoder.decode(data, final=not data)
            if is_start:
                text = text.removeprefix("\ufeff")
                is_start = False
            if text:
                piece, n_replaced = utf8(text)
                self.replaced_bytes += n_replaced
                yield piece

    def _ascii(self) -> Generator[bytes, None, bytes]:
        """The pieces before the encoding is decided; returns the bytes that were read behind them."""
        held, is_end, tells, before = b"", False, _TELLING, b""
        while True:
            found = None if _is_plain(held) else tells.search(held)
            if found is None:
                may_tell = _MAY_TELL.search(held, max(0, len(held) - MARK_BYTES))
                n_given = may_tell.start() if may_tell is not None and not is_end else len(held)
            else:
                held += read_up_to(self._read, max(0, found.start() + SAMPLE_BYTES - len(held)))
                sample = held[found.start() : found.start() + SAMPLE_BYTES]
                decision = _decided_late(sample, (before + held[: found.start()])[-CONTEXT_BYTES:])
                if decision is not None:
                    self.decision = decision
                    self._say()
                    if found.start():
                        yield held[: found.start()]
                    return held[found.start() :]
                tells = _TELLING_BUT_HZ if found[0] == b"~" else _HIGH
                n_given = found.end()
            if n_given:
                yield held[:n_given]
                before, held = (before + held[:n_given])[-CONTEXT_BYTES:], held[n_given:]
            elif is_end:
                return b""
            if found is None and not is_end:
                data = self._read(READ_BYTES)
                held, is_end = held + data, not data


def incremental_decoder(encoding: str) -> codecs.IncrementalDecoder:
    """Of bytes as text, a lone surrogate for each undecodable one, which `utf8` replaces."""
    return codecs.getincrementaldecoder(encoding)(_ERRORS)


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

    source  "named", "byte order mark", "declared", "escape sequence", "valid UTF-8" (mostly valid counts), "ASCII" or
            "guess"
    """

    name: str
    source: str


ASCII = Decision("ascii", "ASCII")  # so far
_ASCII_BUT_GARBAGE = Decision("utf-8", "ASCII")


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
        found = found if found != ASCII or sample.isascii() else _ASCII_BUT_GARBAGE
        text = decoded(clean, found.name)
    n_odd = len(_CONTROL.findall(text)) + len(_SURROGATE.findall(text))
    return found if n_odd <= max(FEW, 0.3 * len(text)) else None


def _decided_late(sample: bytes, before: bytes) -> Decision | None:
    """The encoding of a text that goes on so, and was ASCII before; None where it still is.

    before  what stands right before the sample: words to guess by
    """
    if sample.isascii():
        name = _escaped(sample)
        return None if name is None else Decision(name, "escape sequence")
    found = _guessed(_clean(before + sample) or sample, None)
    return found if found != ASCII else _ASCII_BUT_GARBAGE


def decoded(sample: bytes, encoding: str) -> str:
    """The sample as text, a lone surrogate for each undecodable byte; a character cut at its end is left out."""
    return incremental_decoder(encoding).decode(sample)


def is_hole(sample: bytes) -> bool:
    """Whether nothing has been written so far: what comes behind it is to be looked at."""
    return len(sample) > 32 and not sample.strip(b"\0")


def _is_plain(data: bytes) -> bool:
    """Whether nothing in it tells an encoding, seen at once."""
    return data.isascii() and b"\x1b" not in data and b"~" not in data


def telling(sample: bytes) -> int | None:
    """Where a text is first seen to be more than ASCII, or else may be ASCII with escape sequences."""
    found = _HIGH.search(sample) or _TELLING.search(sample)
    return None if found is None else found.start()


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
    high = _HIGH.search(sample)
    sample = sample[: high.start() + SAMPLE_BYTES] if high is not None else sample
    text = decoded(sample, "utf-8")
    n_bad = len(_SURROGATE.findall(text))
    if declared is not None and (n_bad or text.isascii()):
        n_wrong = len(_SURROGATE.findall(decoded(sample, declared)))
        if n_wrong <= n_bad // 2:
            return Decision(declared, "declared")
    if text.isascii():
        for tells in (_TELLING, _TELLING_BUT_HZ):
            told = tells.search(sample)
            if told is not None and (name := _escaped(sample[told.start() :][:SAMPLE_BYTES])) is not None:
                return Decision(name, "escape sequence")
        return ASCII
    n_good = len(sample) - n_bad - sum(map(str.isascii, text))
    if n_good and n_good >= GOOD_PER_BAD * n_bad:
        return Decision("utf-8", "valid UTF-8")
    import chardet

    found = chardet.detect(sample, compat_names=False, include_encodings=_LIKELY, no_match_encoding="cp1252")
    name = codecs.lookup(found["encoding"] or "cp1252").name
    if found["confidence"] < UNSURE and not _SURROGATE.search(decoded(sample, "cp1252")):
        name = "cp1252"
    if n_good and n_good >= SINGLE_GOOD_PER_BAD * n_bad and len(decoded(bytes(range(256)), name)) == 256:
        return Decision("utf-8", "valid UTF-8")
    wider = _WIDER.get(name, name)
    n_lost, n_lost_wider = (len(_SURROGATE.findall(decoded(sample, encoding))) for encoding in (name, wider))
    return Decision(wider if n_lost_wider <= n_lost else name, "guess")


def _escaped(sample: bytes) -> str | None:
    """The encoding of ASCII whose first escape sequence stands at its start; None where it is none."""
    if sample.startswith(b"~"):
        is_hz = sample.startswith(b"~{") and _HZ.fullmatch(sample) and not _SURROGATE.search(decoded(sample, "hz"))
        return "hz" if is_hz else None
    found = _DESIGNATION.search(sample)
    if found is None:
        return None
    names = {"kr": ["iso2022_kr"], "cn": [iso2022_cn.NAME]}.get(
        str(found.lastgroup), ["iso2022_jp_ext", "iso2022_jp_2", "iso2022_jp_2004"]
    )
    n_lost = {name: len(_SURROGATE.findall(decoded(sample, name))) for name in names}
    name = min(names, key=n_lost.__getitem__)  # of equals the first
    n_wide = sum(not character.isascii() for character in decoded(sample, name))
    return name if n_lost[name] <= n_wide // 2 else None


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
