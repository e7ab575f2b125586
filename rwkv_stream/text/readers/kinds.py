"""Kinds: what a file holds, told by its bytes; its name only helps where bytes cannot tell.

| kind | told by |
|---|---|
| pdf, epub, docx, parquet, zip, tar, warc, arc | how it begins (a PDF within 1 KiB); of a ZIP what it holds |
| html | a server that said so, a doctype or the first tag of a page; a name that says so, and a tag at the start |
| jsonl, csv | a name that says so (`.jsonl`, `.ndjson`, `.csv`, `.tsv`), or a text column that was named and is there |
| text | anything else that is text: Markdown and reStructuredText as they are written, so that lines can be cited |

What begins like another binary format is refused; so is, where no encoding was named, what is full of control
characters or holds NULs in most of its lines; and so is a text whose name says that it should be one of the first row.
A hole at the start, as of a log that was cut while it was written, is looked behind up to HOLE_BYTES.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from rwkv_stream.errors import InputError
from rwkv_stream.text.readers.encodings import SAMPLE_BYTES, Decision, decided, declared, decoded, is_hole, telling
from rwkv_stream.text.readers.streams import COMPRESSED, Opened, zip_file

ARCHIVES = ("zip", "tar", "warc", "arc")
TABLES = ("jsonl", "csv", "parquet")
NAMES = {
    "text": "a text",
    "row": "a text",
    "html": "an HTML page",
    "jsonl": "JSON lines",
    "csv": "CSV",
    "parquet": "a Parquet table",
    "pdf": "a PDF document",
    "epub": "an EPUB",
    "docx": "a DOCX document",
    "zip": "a ZIP archive",
    "tar": "a tar archive",
    "warc": "a WARC file",
    "arc": "an ARC file",
}

HOLE_BYTES = 2**20
_MAGIC_BYTES = 4096
_PIPE_BYTES = 16  # where an encoding is named, a slow pipe need not wait for more ...
_MARKUP_BYTES = 4096  # ... unless they may be the beginning of a page, which these tell
_KNOWN = re.compile(
    rb"(?P<pdf>(?:\xef\xbb\xbf)?\s{0,16}%PDF-|.{0,1015}[\r\n]%PDF-\d\.\d.{0,2000}?\d \d+ obj\b)"
    rb"|(?P<zip>PK(?:\x03\x04|\x05\x06|\x07\x08))|(?P<tar>.{257}ustar)"
    rb"|(?P<parquet>PAR1)|(?P<warc>WARC/\d\.\d+\r?\n)|(?P<arc>filedesc://\S* [^\n]* \d+\r?\n)",
    re.DOTALL,
)
_BINARY = [  # how it begins, what it is, what to do
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive", "unpack it and pass the folder"),
    (COMPRESSED, "compressed data inside compressed data", "unpack it once"),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old or password-protected Microsoft Office document",
        "save it as DOCX without a password",
    ),
    (rb"SQLite format 3\x00", "an SQLite database", "export its text first"),
    (rb"\x7fELF|MZ\x90\x00|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe", "a program", "pass a text"),
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|II\*\x00|MM\x00\*", "an image", "pass a text"),
    (rb"ID3[\x02-\x04]|OggS\x00|fLaC\x00|RIFF.{4}WAVE|.{4}ftyp", "a sound or film", "pass a text"),
]
_BINARY_PATTERNS = [(re.compile(pattern, re.DOTALL), what, advice) for pattern, what, advice in _BINARY]
_HTML = re.compile(
    r"\ufeff?\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|title|meta)\b",
    re.IGNORECASE | re.DOTALL,
)
_TAG = re.compile(r"\ufeff?\s*<(?:!--|[a-z])", re.IGNORECASE)
_MAY_BE_MARKUP = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?[\s\0]*(?:<|$)")

_PACKED_ENDINGS = (".gz", ".zst", ".xz", ".bz2")
_BY_ENDING = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
_HTML_ENDINGS = (".html", ".htm", ".xhtml")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_CLAIMS = {f".{name}": name for name in ("pdf", "epub", "docx", "parquet", *ARCHIVES)}


class NotTextError(InputError):
    """This holds no text that we read."""


def whole(kind: str) -> str:
    """What is expected of a file of that kind."""
    article, _, noun = NAMES[kind].partition(" ")
    return f"a whole {noun}" if article in ("a", "an") else f"whole {NAMES[kind]}"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file holds.

    decision  on its encoding, None where that is no matter of the user's
    """

    name: str
    decision: Decision | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of a page: its media type, and the label of its encoding."""

    media_type: str
    label: str | None


def kind(
    opened: Opened,
    hint: str | None,
    encoding: str | None,
    text_column: str | None,
    served: Served | None = None,
) -> Kind:
    """What `opened` holds, peeked at.

    hint         its path, None where that says nothing
    encoding     of its text, where that is known
    text_column  of a table, where that is named
    raises       InputError, NotTextError
    """
    is_slow = encoding is not None and opened.raw.is_pipe
    head = opened.peek(_PIPE_BYTES if is_slow else _MAGIC_BYTES)
    if is_slow and _MAY_BE_MARKUP.match(head):
        head = opened.peek(_MARKUP_BYTES)
    found = _KNOWN.match(head)
    if found is not None:
        name = str(found.lastgroup)
        return Kind(_zip_kind(opened) if name == "zip" else name)
    for pattern, what, advice in _BINARY_PATTERNS:
        if pattern.match(head):
            raise NotTextError(f"reading '{opened.name}': expected text, found {what}; {advice}")
    sample = head if is_slow else _sample(opened)
    start = sample[:_MARKUP_BYTES]
    label = served.label if served is not None else None
    if label is None and _MAY_BE_MARKUP.match(start):
        label = declared(sample)
    decision = decided(sample, encoding, label)
    if decision is None:
        problem = f"expected text, found {_binary(sample)}; "
        if is_hole(sample) and len(sample) > HOLE_BYTES:
            raise InputError(f"reading '{opened.name}': {problem}cut it off there, or name its encoding (--encoding)")
        raise NotTextError(
            f"reading '{opened.name}': {problem}if it is text, name its encoding, for example --encoding utf-16-le"
        )
    encoding = decision.name
    ending = _ending(hint)
    text = decoded(start, encoding)
    is_page = ending in _HTML_ENDINGS and _TAG.match(text)
    if is_page or _HTML.match(text) or (served is not None and served.media_type in _HTML_TYPES):
        return Kind("html", decision)
    if ending in _CLAIMS and text:
        raise InputError(
            f"reading '{opened.name}': expected {NAMES[_CLAIMS[ending]]}, as its name says, found plain text; "
            "get the file again, or rename it if it is a text"
        )
    if ending in _BY_ENDING:
        return Kind(_BY_ENDING[ending], decision)
    if text_column is not None:
        text = decoded(sample, encoding).lstrip("\ufeff \t\r\n")
        if text.startswith("{"):
            return Kind("jsonl", decision)
        if text_column in re.split(r'[,\t;|"\r]', text.partition("\n")[0]):
            return Kind("csv", decision)
    return Kind("text", decision)


def _sample(opened: Opened) -> bytes:
    """What the encoding is decided from: the first bytes, or those behind a hole, and those from the first one on that
    is not ASCII."""
    sample = opened.peek(SAMPLE_BYTES)
    while is_hole(sample) and len(sample) <= HOLE_BYTES:
        longer = opened.peek(2 * len(sample))
        if len(longer) == len(sample):
            break
        sample = longer
    while (told := telling(sample)) is not None and len(sample) < told + SAMPLE_BYTES:
        longer = opened.peek(told + SAMPLE_BYTES)
        if len(longer) == len(sample):
            break
        sample = longer
    return sample


def _binary(sample: bytes) -> str:
    """What is no text, in words."""
    if is_hole(sample) and len(sample) > HOLE_BYTES:
        return f"nothing but NULs in its first {len(sample) >> 20} MiB"
    return "binary data"


def is_tab_separated(hint: str | None) -> bool:
    return _ending(hint) == ".tsv"


def _ending(hint: str | None) -> str:
    path = PurePosixPath((hint or "").lower())
    return PurePosixPath(path.stem).suffix if path.suffix in _PACKED_ENDINGS else path.suffix


def _zip_kind(opened: Opened) -> str:
    with zip_file(opened) as archive:
        names = set(archive.namelist())
    if "META-INF/container.xml" in names or ("mimetype" in names and any(name.endswith(".opf") for name in names)):
        return "epub"
    for folder, what, advice in (
        ("word/", None, ""),
        ("xl/", "an Excel workbook", "save its sheets as CSV"),
        ("ppt/", "a PowerPoint file", "save it as PDF"),
    ):
        is_office = "[Content_Types].xml" in names or "_rels/.rels" in names
        if is_office and any(name.startswith(folder) for name in names):
            if what is None:
                return "docx"
            raise NotTextError(f"reading '{opened.name}': expected text, found {what}; {advice}")
    if "content.xml" in names and "mimetype" in names:
        raise NotTextError(
            f"reading '{opened.name}': expected text, found an OpenDocument file; save it as DOCX, PDF or HTML"
        )
    return "zip"
