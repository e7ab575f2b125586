"""Where documents have edges: chapters, pages, headings and lines, the same however the text arrives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from rwkv_stream.errors import UsageError
from rwkv_stream.text import edges
from rwkv_stream.text.edges import Edges
from rwkv_stream.text.headings import GAP_BYTES, LINE_BYTES, headings, number
from rwkv_stream.text.readers.places import Place

BOOK = """A TALE

CHAPTER 1. Loomings.

CHAPTER 2. The Carpet-Bag.

CHAPTER 3. The Spouter-Inn.

ETYMOLOGY

Supplied by a late usher.

PART ONE

CHAPTER 1. Loomings.

Call me Ishmael. Chapter 9 is far away.
Chapter 2 begins here, says a line in the midst of a paragraph.

Chapter 2: The Carpet-Bag

I stuffed a shirt into it.

CHAPTER THE LAST

```
# no heading
```
"""
MARKDOWN = """# Title

text

## One ##
text

```sh
# of a shell

# of a shell too
```

### Deeper

text
# no heading: text stands before it
"""


class Told:
    """A text of lines, or one that says where sections begin."""

    def __init__(self, sections: dict[int, Place] | None = None) -> None:
        self.has_lines = sections is None
        self.on_section: list[Callable[[int, Place], object]] = []
        self._sections = dict(sections or {})

    def pieces(self, pieces: list[bytes]) -> Iterator[bytes]:
        at = 0
        for piece in pieces:
            for byte in sorted(self._sections):
                if at <= byte < at + len(piece):
                    for listener in self.on_section:
                        listener(byte, self._sections[byte])
            at += len(piece)
            yield piece


def found(at: str, data: bytes, sizes: list[int], sections: dict[int, Place] | None = None) -> list[int]:
    """The edges, taken as soon as they are said to be known."""
    text, cut, start = Told(sections), [], 0
    for size in [*sizes, len(data)]:
        cut.append(data[start : start + size])
        start += size
    seen = Edges(at, text)
    taken: list[int] = []
    for _ in seen.pieces(text.pieces([piece for piece in cut if piece])):
        taken += seen.before(seen.decided)
    return [*taken, *seen.before(len(data))]


def parts(at: str, text: str) -> list[str]:
    data = text.encode()
    rng = random.Random(3)
    whole = found(at, data, [])
    for step in (1, 2, 7, 60):
        assert found(at, data, [rng.randint(1, 2 * step) for _ in range(len(data) // step)]) == whole, step
    return [data[byte:].decode().split("\n")[0] for byte in whole]


def test_chapters_of_plain_text_begin_with_its_headings() -> None:
    """A list of contents is none; of PART ONE and CHAPTER 1 the first is where the part begins."""
    assert parts("chapter", BOOK) == ["PART ONE", "Chapter 2: The Carpet-Bag", "CHAPTER THE LAST"]
    titles = [one.title for one in headings([BOOK.encode()])]
    assert titles == ["CHAPTER 1. Loomings.", "Chapter 2: The Carpet-Bag", "CHAPTER THE LAST"]
    assert [number(title) for title in titles] == [1, 2, None]


def test_headings_of_markdown_by_their_level() -> None:
    assert parts("heading", MARKDOWN) == ["## One ##", "### Deeper"], "the text's own beginning is no edge"
    assert parts("chapter", MARKDOWN) == ["## One ##"]
    assert [one.title for one in headings([MARKDOWN.encode()])] == ["Title", "One"]


def test_lines_by_a_regular_expression() -> None:
    log = "".join(f"2026-11-0{day} {hour:02} up\r\n" for day in (1, 2, 3) for hour in (0, 12))
    assert parts(r"^2026-11-\d\d 00", log) == ["2026-11-02 00 up\r", "2026-11-03 00 up\r"]
    assert parts("up$", "up\nno\nup") == ["up"]


def test_chapters_and_pages_of_sections() -> None:
    sections: dict[int, Place] = {
        0: {"chapter": "One", "page": 1},
        5: {"chapter": "One", "page": 2},
        9: {"page": 3},
        12: {"chapter": "Two", "page": 3},
        20: {"chapter": "Three", "page": 4},
    }
    data = bytes(range(65, 95))
    for sizes in ([], [1] * 30, [5, 4, 3, 8]):
        assert found("chapter", data, sizes, sections) == found("heading", data, sizes, sections) == [12, 20]
        assert found("page", data, sizes, sections) == [5, 9, 20]
    assert found("page", data, []) == [], "plain text has no pages"


@pytest.mark.parametrize("data", [b"a" * 10, b"# A\n" + b"\n" * 10], ids=["one line", "nothing behind a heading"])
def test_what_never_ends_is_decided_anyway(data: bytes) -> None:
    seen = Edges("heading", Told())
    filler = data[-1:] * (LINE_BYTES + GAP_BYTES)
    given = [data, filler, filler]
    for n, _ in enumerate(seen.pieces(given)):
        behind = sum(map(len, given[: n + 1])) - seen.decided
        assert behind <= LINE_BYTES + GAP_BYTES + len(data)
    assert seen.decided == sum(map(len, given))


def test_more_edges_in_a_chunk_than_may_be_are_counted() -> None:
    seen = Edges("x", Told(), most=2)
    assert (seen.taken([3, 5, 8]), seen.left) == ([3, 5], 1)
    assert (Edges("x", Told()).taken([3, 5, 8]), seen.left) == ([3, 5, 8], 1)


@pytest.mark.parametrize("wrong", ["", "(", "*a"])
def test_what_is_no_kind_of_edge(wrong: str) -> None:
    with pytest.raises(UsageError, match="expected chapter, page, heading or a regular expression"):
        edges.check(wrong)
