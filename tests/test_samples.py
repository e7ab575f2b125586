"""The samples: a story, questions that it answers, a log with anomalies; and how answers are judged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tracemalloc
from collections import deque
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from rwkv_stream.model import Model

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples"
STORY = (SAMPLES / "story.txt").read_bytes()


def script(path: Path) -> ModuleType:
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


weblog = script(SAMPLES / "weblog.py")
answers = script(ROOT / "benchmarks" / "answers.py")
embed = script(ROOT / "benchmarks" / "embed.py")
QUESTIONS = answers.read_jsonl(SAMPLES / "questions.jsonl")
DOCUMENTS = answers.read_jsonl(SAMPLES / "documents.jsonl")


# ---- the story and its questions ----


def test_the_story_is_long_and_in_chapters() -> None:
    text = STORY.decode("utf-8")
    chapters = re.findall(r"^CHAPTER [A-Z]+\n\n(\S.*)\n\n", text, re.MULTILINE)
    assert len(text.split()) >= 8_000
    assert len(chapters) >= 10 and len(set(chapters)) == len(chapters)
    assert "\r" not in text and "\n\n\n" not in text and text.endswith(".\n")
    assert len(STORY) > len(text), "no character takes more than one byte: wrong offsets would go unseen"


def test_there_are_questions_on_every_chapter() -> None:
    starts = [match.start() for match in re.finditer(rb"^CHAPTER ", STORY, re.MULTILINE)]
    edges = list(pairwise([*starts, len(STORY)]))
    asked = [sum(start <= q["byte_start"] < end for q in QUESTIONS) for start, end in edges]
    assert len(QUESTIONS) >= 36
    assert min(asked) >= 2, asked


def test_questions_have_ids_and_texts_of_their_own() -> None:
    for field in ("id", "question"):
        values = [q[field] for q in QUESTIONS]
        assert all(values) and len(set(values)) == len(values)


@pytest.mark.parametrize("question", QUESTIONS, ids=[q["id"] for q in QUESTIONS])
def test_the_span_holds_the_answer(question: dict[str, object]) -> None:
    start, end = question["byte_start"], question["byte_end"]
    assert isinstance(start, int) and isinstance(end, int)
    assert 0 <= start < end <= len(STORY)
    evidence = STORY[start:end].decode("utf-8")  # fails within a character
    before, after = STORY[:start].decode("utf-8")[-1:], STORY[end:].decode("utf-8")[:1]
    assert not (before + evidence[0]).isalnum() and not (evidence[-1] + after).isalnum(), "the span cuts a word"
    assert len(evidence) < 400
    right = answers.words(question["answer"])
    assert right and set(right) <= set(answers.words(evidence))


def test_demo_questions_are_among_the_questions() -> None:
    demo = (SAMPLES / "demo-questions.txt").read_text(encoding="utf-8").splitlines()
    assert demo and set(demo) <= {q["question"] for q in QUESTIONS}


# ---- the log ----

COMBINED = re.compile(
    r'(?P<client>\d+\.\d+\.\d+\.\d+) - - \[(?P<time>[^\]]+)\] "(?P<request>[^"]*)" (?P<status>\d+) (?P<size>\d+|-) '
    r'"(?P<referrer>[^"]*)" "(?P<agent>[^"]*)"'
)
N_KINDS = len(weblog.KINDS)


def run_weblog(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, str(SAMPLES / "weblog.py"), *arguments], capture_output=True, timeout=60)


def parsed(lines: list[str]) -> list[dict[str, str]]:
    matches = [COMBINED.fullmatch(line) for line in lines]
    assert None not in matches
    return [match.groupdict() for match in matches if match]


def when(fields: dict[str, str]) -> datetime:
    return datetime.strptime(fields["time"], "%d/%b/%Y:%H:%M:%S %z")


IS_ANOMALOUS = {
    "sql-injection": lambda f: re.search(r"SELECT|DROP|SLEEP|%20OR%20", f["request"]),
    "path-traversal": lambda f: re.search(r"\.\./|\.\.%2f|\.\.\.\./|%2e%2e/", f["request"]),
    "scanner": lambda f: f["status"] == "404" and f["agent"].startswith("python"),
    "login-brute-force": lambda f: f["request"].startswith("POST /login") and f["agent"].startswith("python"),
    "error-burst": lambda f: f["status"] == "500" and not f["client"].startswith("203.0.113."),
    "strange-agent": lambda f: f["agent"] in weblog.STRANGE_AGENTS,
    "time-jump": lambda f: when(f).year != 2024 or when(f) < weblog.START,
    "huge-response": lambda f: f["size"] != "-" and int(f["size"]) > 1_000_000_000,
    "garbled-request": lambda f: f["request"].startswith("\\x"),
    "odd-method": lambda f: f["request"].split()[0] in ("TRACE", "DEBUG", "PROPFIND"),
    "referrer-spam": lambda f: "cheap-watches" in f["referrer"],
    "impossible-status": lambda f: not 100 <= int(f["status"]) <= 599,
}


@pytest.mark.parametrize("seed", [0, 7, 123456789])
def test_anomalies_stand_where_the_truth_says_and_nowhere_else(seed: int) -> None:
    log = list(weblog.log(6_000, seed, 2 * N_KINDS))
    rows = parsed([str(entry) for entry, _ in log])
    planted = {(truth.line, truth.kind) for _, truth in log if truth}
    found = {
        (line, kind)
        for line, fields in enumerate(rows, start=1)
        for kind, is_anomalous in IS_ANOMALOUS.items()
        if is_anomalous(fields) and not (kind == "scanner" and IS_ANOMALOUS["path-traversal"](fields))
    }
    assert found == planted
    assert {kind for _, kind in planted} == set(IS_ANOMALOUS)
    assert [t.anomaly for _, t in log if t] == sorted(t.anomaly for _, t in log if t)
    assert {t.anomaly for _, t in log if t} == set(range(1, 2 * N_KINDS + 1))


def test_time_goes_on_except_in_time_jumps() -> None:
    log = [(entry, truth) for entry, truth in weblog.log(20_000, 3, 5 * N_KINDS)]
    times = [entry.ms for entry, truth in log if truth is None or truth.kind != "time-jump"]
    assert times == sorted(times)
    assert len(times) == 20_000 - 5


def test_the_day_has_a_rhythm() -> None:
    hours = [when({"time": str(entry).split("[")[1].split("]")[0]}).hour for entry, _ in weblog.log(28_000, 1, 0)]
    assert hours.count(10) > 5 * hours.count(3) > 0


def test_visitors_come_from_the_page_they_saw() -> None:
    entries = [entry for entry, _ in weblog.log(3_000, 5, 0)]
    seen: dict[str, set[str]] = {}
    for entry in entries:
        if entry.referrer.startswith(weblog.SITE):
            assert entry.referrer.removeprefix(weblog.SITE) in seen[entry.client]
        seen.setdefault(entry.client, set()).add(entry.request.split()[1])
    assert len(seen) > 50


@pytest.mark.parametrize(("lines", "anomalies"), [(0, 0), (1, 0), (1, 1), (12, 12), (13, 5), (200, 1), (300, 299)])
def test_any_number_of_lines_and_anomalies(lines: int, anomalies: int) -> None:
    log = list(weblog.log(lines, 4, anomalies))
    assert len(log) == lines
    assert {truth.anomaly for _, truth in log if truth} == set(range(1, anomalies + 1))
    assert all(truth.line == line for line, (_, truth) in enumerate(log, start=1) if truth)


def test_the_script_writes_the_same_log_and_truth_each_time(tmp_path: Path) -> None:
    truths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    first, second = (run_weblog("--lines", "2000", "--seed", "7", "--truth", str(path)) for path in truths)
    assert first.returncode == 0 and first.stderr == b""
    assert first.stdout == second.stdout
    assert truths[0].read_bytes() == truths[1].read_bytes()
    rows = parsed(first.stdout.decode("ascii").splitlines())
    assert len(rows) == 2_000
    truth = answers.read_jsonl(truths[0])
    assert {row["anomaly"] for row in truth} == set(range(1, 13))
    assert all(IS_ANOMALOUS[row["kind"]](rows[row["line"] - 1]) for row in truth)


def test_a_seed_gives_its_log_on_every_python() -> None:
    log = "".join(f"{entry}\n" for entry, _ in weblog.log(5_000, 7))
    assert (
        hashlib.sha256(log.encode()).hexdigest() == "d8b4446932199bbe741ce4e4ec302d5bafd8b361c9643625410a9b7af33a6ece"
    )


def test_another_seed_gives_another_log() -> None:
    assert list(weblog.log(50, 1)) != list(weblog.log(50, 2))


def test_memory_does_not_grow_with_the_log() -> None:
    def peak_bytes(lines: int) -> int:
        tracemalloc.start()
        try:
            deque(weblog.log(lines, 0, lines // 100), maxlen=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(500)  # fills caches
    assert peak_bytes(10_000) < peak_bytes(1_000) + 20_000


@pytest.mark.parametrize(
    "arguments", [["--lines", "-1"], ["--seed", "-1"], ["--lines", "5", "--anomalies", "6"], ["--truth", "/no/such/x"]]
)
def test_bad_arguments_say_which(arguments: list[str]) -> None:
    result = run_weblog(*arguments)
    assert result.returncode == 2 and result.stdout == b""
    assert arguments[-2].encode() in result.stderr.splitlines()[-1]


def test_help_shows_commands_and_kinds() -> None:
    text = run_weblog("--help").stdout.decode()
    assert "python samples/weblog.py --lines 100000" in text
    assert all(kind in text for kind in IS_ANOMALOUS)


def test_a_closed_pipe_is_not_an_error() -> None:
    command = [sys.executable, str(SAMPLES / "weblog.py"), "--lines", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 0


# ---- judging answers ----


@pytest.mark.parametrize(
    ("answer", "right", "f1"),
    [
        ("Captain Ruth Osgood", "Captain Ruth Osgood", 1.0),
        ("the lamp, a lamp!", "Lamp", 2 / 3),  # lamp lamp : lamp → precision 1/2, recall 1
        ("It was Juniper.", "Juniper", 0.5),  # it was juniper → precision 1/3, recall 1
        ("Ruth", "Captain Ruth Osgood", 0.5),  # precision 1, recall 1/3
        ("upon the iron ring", "an iron hook", 0.4),  # upon iron ring : iron hook → precision 1/3, recall 1/2
        ("thirty-seven", "thirty seven", 0.0),  # SQuAD drops the hyphen: thirtyseven
        ("sixpence", "thirty shillings", 0.0),
        ("", "Carrow", 0.0),
        ("the", "a", 0.0),
    ],
)
def test_overlap_f1(answer: str, right: str, f1: float) -> None:
    assert answers.overlap_f1(answer, right) == pytest.approx(f1)
    assert answers.overlap_f1(right, answer) == pytest.approx(f1)


def test_sentences() -> None:
    text = 'A Story\n\nMr. Venn sat. "Why?" said Dr. Wray! "Oh." He left St. Bride\'s in 1.5 hours.'
    assert answers.sentences(text) == [
        "A Story",
        "Mr. Venn sat.",
        '"Why?"',
        "said Dr. Wray!",
        '"Oh."',
        "He left St. Bride's in 1.5 hours.",
    ]


def test_sentences_lose_no_word_of_the_story() -> None:
    text = STORY.decode("utf-8")
    assert " ".join(answers.sentences(text)).split() == text.split()


def test_nearest_sentence_has_most_words_in_common() -> None:
    candidates = ["The dog ran.", "The grey dog ran home by the river.", "The grey dog ran home.", "Dog! Dog! Ran!"]
    assert answers.nearest_sentence("Where ran the grey dog?", candidates) == "The grey dog ran home."
    assert answers.nearest_sentence("Is the dog a dog?", candidates) == "The dog ran."


def test_judge_takes_means() -> None:
    questions = [{"answer": "Juniper"}, {"answer": "the Swallow"}]
    assert answers.judge(["It was Juniper.", "Swallow"], questions) == {"f1": 0.75, "exact": 0.5}


def run_answers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "answers.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_answers_of_a_file_are_judged_by_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [{"id": q["id"], "question": q["question"], "answer": q["answer"].upper()} for q in QUESTIONS]
    rows[0]["answer"] = "nothing at all"
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)), encoding="utf-8")
    result = run_answers("--answers", str(path), "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["questions"] == len(QUESTIONS) == len(figures["answers"])
    assert figures["ask"]["exact"] == pytest.approx(1 - 1 / len(QUESTIONS), abs=1e-4)
    assert 0 < figures["nearest_sentence"]["f1"] < 0.5
    assert figures["answers"][0] == {
        "id": QUESTIONS[0]["id"],
        "right": QUESTIONS[0]["answer"],
        "answer": "nothing at all",
        "f1": 0.0,
    }

    path.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]), encoding="utf-8")
    result = run_answers("--answers", str(path))
    assert result.returncode == 1
    assert all(q["id"] in result.stderr for q in QUESTIONS[:2]) and result.stdout == ""


def test_a_model_is_asked(bytes_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = tmp_path / "story.txt"
    story.write_text("The lamp is green.\n")
    monkeypatch.setattr(answers, "STORY", story)
    given, by_whom = answers.asked_answers(QUESTIONS[:3], str(bytes_model_path), tmp_path / "a.store")
    again, by_whom_again = answers.asked_answers(QUESTIONS[:3], str(bytes_model_path), tmp_path / "a.store")
    assert len(given) == 3 and all(isinstance(answer, str) for answer in given)
    assert (given, by_whom) == (again, by_whom_again)
    assert re.fullmatch("[0-9a-f]{64}", by_whom["model"]) and re.fullmatch("[0-9a-f]{64}", by_whom["snapshot"])


# ---- documents and how well vectors find them ----


def test_there_are_short_documents_told_twice() -> None:
    assert len(DOCUMENTS) >= 40
    for field in ("id", "title", "text", "paraphrase"):
        values = [document[field] for document in DOCUMENTS]
        assert all(value == value.strip() != "" for value in values)
        assert len(set(values)) == len(values)
    for document in DOCUMENTS:
        text, told_again = (set(re.findall(r"\w{4,}", document[field].lower())) for field in ("text", "paraphrase"))
        assert len(text) >= 20, document["id"]
        assert len(text & told_again) <= 0.35 * len(told_again), "a paraphrase has other words"


def test_tf_idf_finds_what_shares_rare_words() -> None:
    corpus = ["the cat sat on the mat", "the dog ate the bone", "the sea is deep"]
    made = embed.tf_idf(["a cat", "some bone", "deep, deep"], corpus)
    assert embed.found(made, embed.tf_idf(corpus, corpus)) == {"first": 1.0, "mrr": 1.0}
    assert embed.found(made[[1, 0, 2]], embed.tf_idf(corpus, corpus)) == {"first": 1 / 3, "mrr": pytest.approx(2 / 3)}


def test_the_benchmark_of_embed_runs(
    bytes_model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "mini_lm", lambda model: None)
    figures = embed.usefulness(bytes_model)
    assert len(figures) == 15
    assert figures["TF-IDF: title to text"]["first"] > 0.4
    assert all(0 < value <= 1 for case in figures.values() for key, value in case.items() if key == "mrr")
    speed = embed.speed(bytes_model, rounds=1, total=2048)
    assert len(speed) == 6
    assert all(case["tok_s"] > 0 for case in speed.values())
    assert "TF-IDF" in capsys.readouterr().out
