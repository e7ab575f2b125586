"""Summaries: of the right state, of spans edge to edge, the same in any batch, in a tree of the right shape."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from program import program, started

import rwkv_stream as rs
from rwkv_stream.answers import prompts, summaries
from rwkv_stream.answers.summaries import Mode, Whole, summarize
from rwkv_stream.answers.summary import Summary
from rwkv_stream.errors import MismatchError, SnapshotError, UsageError
from rwkv_stream.model import Model
from rwkv_stream.model.generation import generate
from rwkv_stream.model.sampling import Sampling
from rwkv_stream.store import Snapshot, Store

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"Day {i}: the keeper lit lamp {i * 7}, and “{chr(97 + i % 26)}é漢” was written.\n" for i in range(14))
CHUNK = 64
SAMPLING = Sampling(temperature=1, seed=5, max_tokens=12)


@pytest.fixture
def store(tmp_path: Path, bytes_model: Model) -> Store:
    """A book of 14 spans, the last of which ends in the middle of a chunk."""
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    store = Store(tmp_path / "books.store", create=True)
    rs.ingest(str(path), model=bytes_model, store=store, name="book.txt", chunk=CHUNK, snapshot_every=CHUNK)
    return store


@pytest.fixture
def book(store: Store) -> Snapshot:
    return store.get("book.txt")


def lineage(store: Store, snapshot: Snapshot) -> list[Snapshot]:
    return [snapshot, *store.ancestors(snapshot)][::-1]


def damage(snapshot: Snapshot) -> None:
    path = snapshot.reader.objects.path(snapshot.objects[0].name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def edge_to_edge(made: list[Summary], end: Snapshot) -> None:
    assert (made[0].byte_start, made[0].token_start) == (0, 0)
    assert (made[-1].byte_end, made[-1].token_end) == (end.bytes, end.tokens)
    for before, after in itertools.pairwise(made):
        assert (before.byte_end, before.token_end) == (after.byte_start, after.token_start)


def forked(model: Model, snapshot: Snapshot, prompt: str, index: int, sampling: Sampling = SAMPLING) -> str:
    """What `generate`, which knows nothing of summaries, makes of this state and prompt."""
    stop = prompts.family(model).stop
    sampling = dataclasses.replace(sampling, stop=stop)
    return "".join(generate(model, prompt, state=snapshot.state(), sampling=sampling, index=index)).strip()


# ---- whole ----


def test_a_whole_is_a_fork_of_the_snapshot(book: Snapshot, bytes_model: Model) -> None:
    (made,) = summarize(snapshot=book, model=bytes_model, sampling=SAMPLING)
    prompt = prompts.family(bytes_model).summarizing(prompts.SUMMARIES["whole"])
    assert made.text == forked(bytes_model, book, prompt, 0) != ""
    assert (made.document, made.level, made.index, made.snapshot) == ("book.txt", 0, 0, book.id)
    edge_to_edge([made], book)
    whole = Whole(book, bytes_model, SAMPLING)
    assert "".join(whole) == made.text
    assert whole.summary == made


# ---- each ----


def test_each_forks_the_state_at_the_end_of_its_span(store: Store, book: Snapshot, bytes_model: Model) -> None:
    made = list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))
    ends = lineage(store, book)
    assert len(made) == len(ends) == math.ceil(book.tokens / CHUNK) > 10
    edge_to_edge(made, book)
    assert [s.snapshot for s in made] == [s.id for s in ends]
    family = prompts.family(bytes_model)
    assert made[0].text == forked(bytes_model, ends[0], family.summarizing(prompts.SUMMARIES["whole"]), 0)
    for i in (1, 7, len(ends) - 1):
        words = max(1, round((made[i].byte_end - made[i].byte_start) / 6 - 0.5))
        task = prompts.SUMMARIES["span"].replace("{words}", str(words))
        assert made[i].text == forked(bytes_model, ends[i], family.summarizing(task), i)
    assert len({s.text for s in made}) > 10


@pytest.mark.parametrize("rows", [1, 5])
def test_texts_do_not_depend_on_their_batch(
    book: Snapshot, bytes_model: Model, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))
    monkeypatch.setattr(summaries, "ROWS", rows)
    assert list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING)) == expected


def test_ancestors_of_a_reference_only(store: Store, book: Snapshot, bytes_model: Model) -> None:
    middle = store.get("book.txt@50%")
    made = list(summarize(snapshot=middle, model=bytes_model, mode="each", sampling=SAMPLING))
    edge_to_edge(made, middle)
    whole = list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))
    assert made == whole[: len(made)]
    assert len(made) < len(whole)


def test_a_span_grows_over_snapshots_that_were_removed(store: Store, book: Snapshot, bytes_model: Model) -> None:
    ends = lineage(store, book)
    for removed in (ends[0], ends[4], ends[5]):
        store.rm(removed.id)
    made = list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))
    edge_to_edge(made, book)
    assert [s.snapshot for s in made] == [s.id for i, s in enumerate(ends) if i not in (0, 4, 5)]


def test_a_damaged_span_is_left_out_and_told_of(store: Store, book: Snapshot, bytes_model: Model) -> None:
    expected = list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))
    damage(lineage(store, book)[3])
    failures: list[rs.RwkvStreamError] = []
    made = list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING, on_failure=failures.append))
    assert made == expected[:3] + expected[4:]
    assert [type(failure) for failure in failures] == [SnapshotError]
    assert f"{expected[3].byte_start}-{expected[3].byte_end}" in str(failures[0])
    with pytest.raises(SnapshotError):
        list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))


# ---- rolling ----


@pytest.mark.parametrize("budget", [1, 7, 30])
def test_rolling_hands_the_summary_on_within_the_budget(
    store: Store, book: Snapshot, bytes_model: Model, budget: int
) -> None:
    """Of random bytes many are no UTF-8, and read again are three tokens each."""
    sampling = dataclasses.replace(SAMPLING, max_tokens=30)
    made = list(summarize(snapshot=book, model=bytes_model, mode="rolling", sampling=sampling, budget=budget))
    family = prompts.family(bytes_model)
    before = ""
    for i, (summary, end) in enumerate(zip(made, lineage(store, book), strict=True)):
        assert (summary.byte_start, summary.byte_end, summary.snapshot) == (0, end.bytes, end.id)
        assert summary.tokens <= budget
        assert len(bytes_model.tokenizer.encode(summary.text)) <= budget
        task = family.summarizing(prompts.SUMMARIES["rolling" if i else "whole"], before)
        assert before in task
        made_now = forked(bytes_model, end, task, i, dataclasses.replace(sampling, max_tokens=budget))
        assert made_now.startswith(summary.text)
        before = summary.text
    assert len({summary.text for summary in made}) > 2


# ---- tree ----


@pytest.mark.parametrize("group", [2, 3, 5])
@pytest.mark.parametrize("spans", [1, 2, 3, 4, 5, 6, 7, 9, 14])
def test_the_tree_has_one_root_and_covers_the_text(
    store: Store, book: Snapshot, bytes_model: Model, spans: int, group: int
) -> None:
    top = lineage(store, book)[spans - 1]
    short = dataclasses.replace(SAMPLING, max_tokens=2)
    made = list(summarize(snapshot=top, model=bytes_model, mode="tree", sampling=short, group=group))
    levels: dict[int, list[Summary]] = {}
    seen: set[tuple[int, int]] = set()
    for node in made:
        assert {(node.level - 1, child) for child in node.children} <= seen, "a summary came before its parts"
        seen.add((node.level, node.index))
        levels.setdefault(node.level, []).append(node)
    assert len(seen) == len(made)
    assert len(levels[0]) == spans
    assert len(levels[max(levels)]) == 1
    assert made[-1] == levels[max(levels)][0]
    assert len(levels) <= 1 + math.ceil(math.log(spans, group))
    for level, nodes in levels.items():
        edge_to_edge(nodes, top)
        if level:
            assert [child for node in nodes for child in node.children] == list(range(len(levels[level - 1])))
            assert all(2 <= len(node.children) <= group + 1 for node in nodes)
            assert all(len(node.children) == group for node in nodes[:-1])
            for node in nodes:
                first, *_, last = [levels[level - 1][child] for child in node.children]
                assert node.byte_start == first.byte_start
                assert (node.byte_end, node.snapshot) == (last.byte_end, last.snapshot)


def test_joining_reads_the_parts_from_the_start(book: Snapshot, bytes_model: Model) -> None:
    greedy = dataclasses.replace(SAMPLING, temperature=0)
    made = list(summarize(snapshot=book, model=bytes_model, mode="tree", sampling=greedy, group=4))
    family = prompts.family(bytes_model)
    nodes = {(node.level, node.index): node for node in made}
    stop = dataclasses.replace(greedy, stop=family.stop)
    for node in made:
        if node.level:
            texts = [nodes[node.level - 1, child].text for child in node.children]
            prompt = "\n\n".join(filter(None, texts)) + family.summarizing(prompts.SUMMARIES["join"])
            assert node.text == "".join(generate(bytes_model, prompt, sampling=stop)).strip()


def test_leaves_of_a_tree_are_the_summaries_of_each(book: Snapshot, bytes_model: Model) -> None:
    tree = summarize(snapshot=book, model=bytes_model, mode="tree", sampling=SAMPLING, group=3)
    leaves = [node for node in tree if node.level == 0]
    assert leaves == list(summarize(snapshot=book, model=bytes_model, mode="each", sampling=SAMPLING))


def test_a_tree_is_made_as_it_is_asked_for(book: Snapshot, bytes_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read than a batch of spans before the first summary is there."""
    monkeypatch.setattr(summaries, "ROWS", 2)
    loaded: list[str] = []
    state = Snapshot.state

    def counted(snapshot: Snapshot) -> object:
        loaded.append(snapshot.id)
        return state(snapshot)

    monkeypatch.setattr(Snapshot, "state", counted)
    next(iter(summarize(snapshot=book, model=bytes_model, mode="tree", sampling=SAMPLING)))
    assert len(loaded) == 2


# ---- arguments ----


@pytest.mark.parametrize(
    "arguments",
    [{"mode": "half"}, {"budget": 5}, {"mode": "rolling", "budget": 0}, {"mode": "tree", "group": 1}],
    ids=str,
)
def test_arguments_that_make_no_sense(book: Snapshot, bytes_model: Model, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        summarize(snapshot=book, model=bytes_model, **arguments)  # type: ignore[arg-type]


def test_another_model_is_refused(book: Snapshot, other_bytes_model_path: Path) -> None:
    with pytest.raises(MismatchError):
        summarize(snapshot=book, model=rs.load(other_bytes_model_path, device="cpu"))


@pytest.mark.parametrize("name", prompts.FAMILIES)
@pytest.mark.parametrize("task", prompts.SUMMARIES)
def test_prompts_of_every_family_stand_apart_and_end_without_a_space(name: str, task: str) -> None:
    family = prompts.FAMILIES[name]
    prompt = family.summarizing(prompts.SUMMARIES[task], "One {question}.\n\nTwo.")
    assert prompt.startswith("\n\n")
    assert not prompt.endswith(" ")
    assert ("One {question}.\nTwo." in prompt) == (task == "rolling")


# ---- the program ----


@pytest.fixture
def arguments(store: Store, bytes_model_path: Path) -> list[object]:
    common = ["--store", store.path, "--model", bytes_model_path, "--threads", 1]
    return ["summarize", *common, "--from-snapshot", "book.txt", "--max-tokens", 8, "--temperature", 1, "--seed", 5]


def rows(*given: object) -> list[dict[str, object]]:
    ended = program(*given, "--json")
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


@pytest.mark.parametrize(
    ("options", "mode"), [([], "whole"), (["--each"], "each"), (["--tree", "--group", 3], "tree")], ids=str
)
def test_json_lines_and_tables_hold_what_python_gives(
    arguments: list[object], options: list[object], mode: Mode, book: Snapshot, bytes_model: Model, tmp_path: Path
) -> None:
    sampling = dataclasses.replace(prompts.family(bytes_model).sampling, temperature=1, seed=5, max_tokens=8)
    made = summarize(snapshot=book, model=bytes_model, mode=mode, sampling=sampling, group=3)
    expected = [{**dataclasses.asdict(summary), "children": list(summary.children), "extracts": []} for summary in made]
    assert [{name: row[name] for name in row if name != "taken"} for row in rows(*arguments, *options)] == expected
    out = tmp_path / "out.parquet"
    assert program(*arguments, *options, "-o", out).code == 0
    assert pq.read_table(out).to_pylist() == expected
    assert pq.read_schema(out).metadata[b"model"].decode() == bytes_model.fingerprint
    assert program(*arguments, *options, "-o", tmp_path / "out.jsonl").code == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected


def test_text_is_the_same(arguments: list[object]) -> None:
    (whole,) = rows(*arguments)
    assert program(*arguments).out == f"{whole['text']}\n"
    each = rows(*arguments, "--each")
    shown = program(*arguments, "--each").out
    for row in each:
        assert f"bytes {row['byte_start']:,} to {row['byte_end']:,}\n" in shown


def test_rolling_shows_the_last_and_with_each_all(arguments: list[object], store: Store, book: Snapshot) -> None:
    every = rows(*arguments, "--rolling", "--each", "--budget", 6)
    assert len(every) == len(lineage(store, book))
    assert rows(*arguments, "--rolling", "--budget", 6) == every[-1:]
    assert program(*arguments, "--rolling", "--budget", 6).out == f"{every[-1]['text']}\n"


def test_markdown_has_a_heading_for_each(arguments: list[object], tmp_path: Path) -> None:
    nodes = rows(*arguments, "--tree", "--group", 3)
    out = tmp_path / "book.md"
    assert program(*arguments, "--tree", "--group", 3, "-o", out).code == 0
    title, *headings = [line for line in out.read_text().split("\n") if line.startswith("#")]
    assert title == "# Summary of book.txt"
    assert len(headings) == len(nodes)
    for heading, node in zip(headings, nodes, strict=True):
        level = int(str(node["level"]))
        assert heading.startswith("#" * (6 - level) + " ")
        assert f"ytes {node['byte_start']:,} to {node['byte_end']:,}" in heading


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--tree", "--each"], 2),
        (["--budget", 5], 2),
        (["--group", 5], 2),
        (["-o", "out.txt"], 2),
        (["--from-snapshot", "nothing.txt"], 10),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[object], options: list[object], code: int) -> None:
    ended = program(*arguments, *options)
    assert ended.code == code
    assert ended.out == ""


def test_a_folder_of_that_name_stays(arguments: list[object], tmp_path: Path) -> None:
    for name in ("a.md", "a.parquet"):
        (tmp_path / name).mkdir()
        ended = program(*arguments, "-o", tmp_path / name)
        assert (ended.code, "folder" in ended.err) == (1, True)
        assert (tmp_path / name).is_dir()


def test_another_model_ends_with_13(arguments: list[object], other_bytes_model_path: Path) -> None:
    assert program(*arguments, "--model", other_bytes_model_path).code == 13


def test_damage_ends_with_3_and_where_nothing_is_left_with_12(
    arguments: list[object], store: Store, book: Snapshot, tmp_path: Path
) -> None:
    ends = lineage(store, book)
    damage(ends[2])
    ended = program(*arguments, "--each", "-o", tmp_path / "out.parquet")
    assert ended.code == 3
    assert sum(ends[2].id[:12] in line for line in ended.err.splitlines()) == 1
    assert pq.read_table(tmp_path / "out.parquet").num_rows == len(ends) - 1
    assert program(*arguments).code == 0, "the snapshot itself is whole"
    for end in (*ends[:2], *ends[3:]):
        damage(end)
    for name in ("none.parquet", "none.md"):
        assert program(*arguments, "--tree", "-o", tmp_path / name).code == 12
        assert not (tmp_path / name).exists()
    assert program(*arguments).code == 12


@pytest.mark.parametrize(
    ("name", "sent", "code"), [("out.md", signal.SIGINT, 130), ("out.parquet", signal.SIGTERM, 143)]
)
def test_interrupted_output_is_not_there(
    arguments: list[object], name: str, sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / name).write_text("from before")
    child = started(*arguments, "--each", "--max-tokens", "10000000", "-o", folder / name)
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) == 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(sent)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code, err
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "from before"
