"""The text of a reading is kept as it was tokenised, with the places that the reader tells, wherever it began."""

from __future__ import annotations

import io
import os
import random
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_files import docx, epub, json_lines, parquet, pdf, record, xhtml, zipped
from program import program

from rwkv_stream.errors import StoppedError
from rwkv_stream.interrupts import StopRequest
from rwkv_stream.model import Model
from rwkv_stream.reading import keeping
from rwkv_stream.reading.ingest import ReadingProgress, ReadingReport, ingest
from rwkv_stream.store import Snapshot, Store, texts
from rwkv_stream.store.layout import files
from rwkv_stream.text.readers import documents

T, EVERY = 32, 128
WORDS = ["lamp", "keeper", "sea", "stone", "café", "Ωμέγα", "🕯", "rain"]


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def prose(n_bytes: int, seed: int = 0) -> bytes:
    rng = random.Random(seed)
    text = "".join(rng.choice(WORDS) + rng.choice([" ", " ", ". ", ".\n", "\n\n"]) for _ in range(n_bytes))
    return head(text.encode(), n_bytes)


def head(text: bytes, n_bytes: int) -> bytes:
    """The whole characters in so many bytes."""
    return text[:n_bytes].decode(errors="ignore").encode()


class Desk:
    """A model, a store and a folder to write texts into."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.store = Store(folder / "a.store", create=True)

    def read(self, text: bytes, name: str = "book.txt", **options: object) -> ReadingReport:
        path = self.folder / "text.txt"
        path.write_bytes(text)
        return ingest(
            path, name=name, model=self.model, store=self.store, **{"chunk": T, "snapshot_every": EVERY, **options}
        )

    def kept(self, ref: str) -> bytes | None:
        found = self.store.text(self.store.get(ref))
        return b"".join(found.pieces()) if found is not None else None

    def lineage(self, ref: str = "book.txt") -> list[Snapshot]:
        head = self.store.get(ref)
        return [head, *self.store.ancestors(head)]

    def whole(self, text: bytes, ref: str = "book.txt") -> bool:
        """Whether each snapshot of a document has all the text that it has read."""
        assert self.store.verify(read_data=True).damaged == []
        return [self.kept(s.id) for s in self.lineage(ref)] == [text[: s.bytes] for s in self.lineage(ref)]


@pytest.fixture
def desk(bytes_model: Model, tmp_path: Path) -> Desk:
    """Each byte is a token: snapshots stand within characters, too."""
    return Desk(bytes_model, tmp_path)


# ---- places ----

CHAPTERS = {f"c{i}.xhtml": xhtml(f"<h1>Of {word}</h1><p>{word} and {word}.</p>") for i, word in enumerate(WORDS)}
ROWS = [{"id": f"a{i}" if i % 3 else i, "text": f"{word}\n{word}"} for i, word in enumerate(WORDS)]
FORMATS = {
    "a.txt": prose(400),
    "a.md": b"# Head\n\nText.\n\n## Other\r\n\r\nMore.\n" * 5,
    "a.html": b"<h1>Head</h1><p>Text.</p><h2>Other</h2><p>More.</p><pre>one\ntwo</pre>",
    "a.epub": epub(CHAPTERS, contents=[(name, f"Of {name}") for name in CHAPTERS]),
    "a.docx": docx(["Before.", ("Heading 1", "One"), "Text.", ("Heading 1", "Two"), [["a", "b"], ["c", "d"]]]),
    "a.pdf": pdf([["page one", "of two lines"], [], ["page three"], ["page four"]]),
    "a.jsonl": json_lines([*ROWS, {"id": 10**25, "text": "large"}, {"id": None, "text": "none"}]),
    "a.csv": b'id,text\n1,"one\ntwo"\n,\n3,three\n',
    "a.parquet": parquet({"id": [1, 2, 3], "text": ["one", "", "three"]}),
    "a.zip": zipped({"one.txt": b"one\ntwo\n", "two.html": b"<h1>Head</h1><p>Text.</p>"}),
    "a.warc": record("http://a.org/", b"<h1>Head</h1><p>Text.</p>") + record("http://a.org/b", b"<p>Other.</p>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_places_are_those_that_the_reader_tells(name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text is the one whose bytes it counts, wherever extents end."""
    monkeypatch.setattr(texts, "EXTENT_BYTES", 60)
    monkeypatch.setattr(keeping, "EXTENT_BYTES", 60)
    path = desk.folder / name
    path.write_bytes(FORMATS[name])
    found = [*documents([path])]
    assert found
    for document in found:
        report = ingest(document, model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY)
        kept = desk.store.text(desk.store.get(report.snapshot))
        assert kept is not None
        with document.text() as text:
            expected = []
            for piece in text:
                start = len(expected)
                expected += [(text.place(start + i), piece[i]) for i in range(len(piece))]
        assert [(kept.place(i), kept.read(i, i + 1)[0]) for i in range(kept.byte_end)] == expected
        assert kept.byte_end == report.bytes == len(expected)
    assert desk.store.verify(read_data=True).damaged == []


# ---- going on ----


def test_a_text_that_grows_is_gone_on_with(desk: Desk) -> None:
    text = prose(1000)
    desk.read(head(text, 500))
    first = {path.name for path in files(desk.store._files.texts.folder)}
    desk.read(text)
    assert desk.whole(text)
    kept = {path.name for path in files(desk.store._files.texts.folder)}
    assert first < kept and len(kept - first) == len(desk.lineage()) - 500 // EVERY
    fresh = Desk(desk.model, desk.folder / "fresh")
    (desk.folder / "fresh").mkdir(exist_ok=True)
    fresh.read(text)
    assert fresh.lineage()[0].text == desk.lineage()[0].text, "as if read at once"
    edited = head(text, 700) + b"!" + text[len(head(text, 700)) :]
    desk.read(edited)
    assert desk.whole(edited)


def test_a_shared_beginning_is_kept_once_and_with_its_own_places(desk: Desk) -> None:
    """Texts alike share extents; where the places differ, they do not, and no document gets another's."""
    text = prose(700)
    desk.read(text)
    n_before = len([*files(desk.store._files.texts.folder)])
    other = head(text, 600) + b" and another end."
    report = desk.read(other, name="other.txt")
    assert report.shared_with == "book.txt" and report.resumed_from_token == 512
    assert desk.kept("other.txt") == other
    assert len([*files(desk.store._files.texts.folder)]) == n_before + 1
    for name in ("one", "two"):
        path = desk.folder / f"{name}.jsonl"
        path.write_bytes(
            json_lines([{"id": f"{name}-1", "text": prose(300, 5).decode()}, {"id": f"{name}-2", "text": name}])
        )
        ingest(path, name=name, model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY)
    found = desk.store.text(desk.store.get("two"))
    assert found is not None and desk.store.get("two~1").document == "one", "whose snapshot it went on from"
    assert found.place(0) == {"row": 1, "id": "two-1"}
    assert found.place(found.byte_end - 1) == {"row": 2, "id": "two-2"}
    assert desk.whole(text)


def test_a_reading_without_text_keeps_none_until_one_with(desk: Desk) -> None:
    """Which need not compute anything again: the text is there, be it unchanged or grown."""
    text = prose(900)
    beginning = head(text, 500)
    desk.read(beginning, keep_text=False)
    assert [s.text for s in desk.lineage()] == [None] * 4
    assert not [*files(desk.store._files.texts.folder)]
    report = desk.read(beginning)
    assert (report.snapshots_written, report.resumed_from_token) == (0, len(beginning))
    assert desk.kept("book.txt") == beginning
    assert desk.kept("book.txt~1") is None
    report = desk.read(text)
    assert report.resumed_from_token == 384
    assert desk.kept("book.txt") == text and desk.kept("book.txt@800") == text[:768]
    desk.read(text, keep_text=False)
    assert desk.kept("book.txt") == text, "what was kept stays"
    desk.read(text + b" More.", keep_text=False)
    assert desk.kept("book.txt") is None
    desk.read(text, restart=True)
    assert desk.whole(text), "shared records get it too"


def test_damaged_text_is_kept_again(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    text = prose(700)
    desk.read(head(text, 400))
    tip = desk.store.get("book.txt~1").text
    assert tip is not None
    desk.store._files.texts.path(tip).write_bytes(b"damaged")
    desk.read(text)
    assert "the text of 'book.txt' is kept again" in caplog.text
    assert desk.kept("book.txt") == text


@pytest.mark.parametrize("n_bytes", [EVERY, EVERY * 3, EVERY * 3 + T, EVERY * 3 + 1])
def test_stdin(desk: Desk, monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Read without, then again with text: also where a snapshot stands at the end and nothing is left to be read."""
    text = head(prose(2000), n_bytes).ljust(n_bytes, b".")

    def pipe(content: bytes, **options: object) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        ingest("-", name="piped", model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY, **options)

    pipe(text, keep_text=False)
    assert desk.kept("piped") is None
    pipe(text)
    assert desk.kept("piped") == text
    pipe(text + text)
    assert desk.kept("piped") == text + text
    assert desk.store.verify(read_data=True).damaged == []


def test_ends_off_the_grid_limits_and_starts(desk: Desk) -> None:
    text, second = prose(900), prose(300, seed=3)
    desk.read(text, max_tokens=333)
    assert desk.kept("book.txt") == text[:333]
    desk.read(text)
    assert desk.whole(text)
    shorter = desk.read(text, max_tokens=444)
    assert desk.kept(shorter.snapshot) == text[:444]
    assert desk.whole(text)
    desk.read(second, name="second", from_snapshot="book.txt")
    assert desk.kept("second") == second, "its own text only"
    assert desk.whole(second, "second")


@pytest.mark.parametrize("at", [EVERY + 2 * T, EVERY])
def test_an_interrupted_reading(desk: Desk, at: int) -> None:
    text = prose(700)
    stop = StopRequest()

    def interrupt(progress: ReadingProgress) -> None:
        if progress.tokens == at:
            stop(signal.SIGINT, None)

    with pytest.raises(StoppedError):
        desk.read(text, on_progress=interrupt, stop=stop)
    assert desk.kept("book.txt") == text[:at]
    desk.read(text)
    assert desk.whole(text)


def test_a_short_document_costs_no_file_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text lies in its record."""
    counts: dict[bool, int] = {}
    for keep_text in (False, True):
        calls: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", calls.append)
            desk.read(b"A short text, %d." % keep_text, name=f"{keep_text}", keep_text=keep_text)
        counts[keep_text] = len(calls)
    assert not [*files(desk.store._files.texts.folder), *files(desk.store._files.texts.postings_folder)]
    assert counts[True] <= counts[False]


def test_a_long_id_is_written_before_its_text_is_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where text that was read without is kept from its start."""
    monkeypatch.setattr(texts, "EXTENT_BYTES", 100)
    monkeypatch.setattr(keeping, "EXTENT_BYTES", 100)
    path = desk.folder / "a.jsonl"
    rows = [{"id": f"{i}" * 200, "text": f"Row {i}."} for i in range(9)]
    path.write_bytes(json_lines(rows))
    for keep_text in (False, True):
        ingest(path, name="a", model=desk.model, store=desk.store, chunk=T, snapshot_every=EVERY, keep_text=keep_text)
    kept = desk.store.text(desk.store.get("a"))
    assert kept is not None
    assert [kept.place(7 * i) for i in range(9)] == [{"row": i + 1, "id": row["id"]} for i, row in enumerate(rows)]


# ---- memory ----


@pytest.mark.parametrize("before", [None, False, True], ids=["anew", "without text before", "with text before"])
def test_no_more_is_held_than_an_extent_and_what_was_drawn_ahead(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, before: bool | None
) -> None:
    """Without a snapshot for a long time, and where text that was read without is kept from its start."""
    size = 4096
    monkeypatch.setattr(texts, "EXTENT_BYTES", size)
    monkeypatch.setattr(keeping, "EXTENT_BYTES", size)
    monkeypatch.setattr("rwkv_stream.text.readers.encodings.READ_BYTES", 1024)
    text = prose(60_000)
    options = {"chunk": 1024, "snapshot_every": 40 * 1024}
    if before is not None:
        desk.read(head(text, 45_000), keep_text=before, **options)
    held: list[int] = []
    real = keeping.Keeping.pieces

    def pieces(self: keeping.Keeping) -> Iterator[bytes]:
        for piece in real(self):
            held.append(len(self._text))
            yield piece

    monkeypatch.setattr(keeping.Keeping, "pieces", pieces)
    desk.read(text, **options)
    ahead = 8 * 1024  # of the chunk under way and the tokenizer
    assert len(held) > 10 and max(held) <= size + ahead
    assert desk.kept("book.txt") == text
    kept = desk.store.text(desk.store.get("book.txt"))
    assert kept is not None and max(map(len, kept.pieces())) <= size


# ---- the program ----


def test_the_program(program_folder: Path) -> None:
    Path("notes").mkdir()
    for name in ("a.txt", "b.md"):
        (Path("notes") / name).write_text(f"The text of {name}.\n" * 6)
    assert program("ingest", "notes", "--chunk", "64", "--snapshot-every", "64").code == 0
    store = Store("store")
    for name in ("a.txt", "b.md"):
        found = store.text(store.get(f"notes/{name}"))
        assert found is not None and found.read(0, 200) == f"The text of {name}.\n".encode() * 6
    assert "kept, " in program("snapshots", "show", "a.txt").out
    assert program("ingest", "notes/a.txt", "--name", "c.txt", "--no-text", "--restart").code == 0
    Path("d.txt").write_text("Nobody is to know.")
    assert program("ingest", "d.txt", "--no-text").code == 0
    shown = program("snapshots", "show", "d.txt").out
    assert "not kept" in shown
    assert program("snapshots", "export", "a.txt", "--no-text", "-o", "out").code == 0
    with tarfile.open("out") as tar:
        assert {name.partition("/")[0] for name in tar.getnames()} == {"format", "objects", "records", "refs"}
    store.text(store.get("a.txt"))
    for path in files(store._files.texts.postings_folder):
        path.unlink()
    assert "indexed 4 extents of text again" in program("snapshots", "verify").err
    for name in ("notes/a.txt", "notes/b.md", "c.txt") * 2:
        assert program("snapshots", "rm", name).code in (0, 10), "of one text there is one snapshot"
    assert "4 extents of text" in program("snapshots", "prune").out
    assert not [*files(store._files.texts.folder), *files(store._files.texts.postings_folder)]
