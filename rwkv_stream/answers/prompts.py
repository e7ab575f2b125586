"""What a model was trained to be asked like: one table of prompt families, and the questions themselves.

A prompt is what is read after the snapshot and before the answer. It begins with a blank line, so that it stands
apart from the text that was read, and ends without a space: the answer brings its own. A family's stop texts belong
to its form and hold with every sampling; its sampling is what a question is answered with unless asked otherwise.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.model.sampling import Sampling

if TYPE_CHECKING:
    from rwkv_stream.model import Config, Model

Order = Literal["after", "before", "both"]  # of a question and a passage
PLACE = "{question}"
SUMMARY_PLACE = "{summary}"
SUMMARIES = {
    "whole": "Summarize the whole text above in a few sentences.",
    "span": "Summarize only the end of the text above, its last {words} words or so, in a few sentences.",
    "rolling": "This is a summary of the text above without its last part:\n{summary}\n"
    "Rewrite it as a summary of the whole text, the last part included, no longer than before.",
    "join": "Above are summaries of the parts of a text, in order. Summarize them all in a few sentences.",
}
LINE_BYTES = 1 << 20  # of a question file: what a question may be at most


@dataclass(frozen=True, slots=True)
class Family:
    """How one family of models is asked."""

    name: str
    template: str
    stop: tuple[str, ...]
    sampling: Sampling
    summary: str | None = None  # template of a summary, where it is not that of a question
    abstaining: str = ""  # what follows a question that is asked of a part of a text, which may not hold the answer

    def summarizing(self, task: str, summary: str = "") -> str:
        """The prompt for a summary: a task of `SUMMARIES`, which may hold the place of summaries made before."""
        return fill(self.summary or self.template, task.replace(SUMMARY_PLACE, clean(summary) if summary else "(none)"))


# Templates: BlinkDL's model cards and ChatRWKV demos, for Raven the Gradio demo. An answer that may hold blank lines is
# ended by the next turn only. Answers are greedy, so that a question has one answer; models that repeat themselves when
# greedy get the penalties of the ChatRWKV question-answering settings. G models answer without thinking: a prompt that
# ends in "Assistant: <think" makes them think, without the ">", which they write themselves.
_PENALISED = Sampling(temperature=0, presence_penalty=0.4, frequency_penalty=0.4)
_ABSTAIN = " If the text above does not say it, answer only: unknown."
_ABSTAINS = re.compile(
    r"\W*(?:unknown|n/?a|no answer|i (?:do not|don['’]t) know|(?:it|this|that) is (?:unknown|not (?:known|mentioned))"
    r"|not (?:mentioned|stated|specified|given|provided|known|said)"
    r"|the (?:text|passage|document) (?:does not|doesn['’]t)"
    r" (?:say|mention|specify|state|tell|provide)\b.*|there is no (?:information|mention)\b.*)\W*",
    re.IGNORECASE | re.DOTALL,
)
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "pile",
            "\n\nQuestion: {question}\n\nAnswer:",
            ("\n\n",),
            _PENALISED,
            summary="\n\n{question}\n\nSummary:",  # it has seen no instructions, but texts with a summary
        ),
        Family(
            "raven",
            "\n\nBelow is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n# Instruction:\n{question}\n\n# Response:\n",
            ("\n\nBelow is an instruction", "\n\n# Instruction:"),
            _PENALISED,
            abstaining=_ABSTAIN,
        ),
        Family("world-4", "\n\nQuestion: {question}\n\nAnswer:", ("\n\n",), _PENALISED, abstaining=_ABSTAIN),
        Family("world", "\n\nUser: {question}\n\nAssistant:", ("\n\n",), _PENALISED, abstaining=_ABSTAIN),
        Family(
            "g1", "\n\nUser: {question}\n\nAssistant:", ("\n\nUser:",), Sampling(temperature=0), abstaining=_ABSTAIN
        ),
        Family("rwkv-stream", "\n\nQuestion: {question}\nAnswer:", ("\n",), Sampling(temperature=0, max_tokens=64)),
    )
}
# Within names: RWKV-4-Raven-7B-…, rwkv-raven-1b5; rwkv7-g1-…, rwkv7-g0a3-…, rwkv7-0.4B-g1.
_RAVEN = re.compile(r"raven", re.IGNORECASE)
_G_MODEL = re.compile(r"(?<![a-z0-9])g[01](?:[a-z]\d*)?(?![a-z0-9])", re.IGNORECASE)
_NO_NAME = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.\w+(\.index\.json)?")  # of files in Hugging Face folders


def family(model: Model) -> Family:
    """The family of a model; see `choose`."""
    return choose(model.tokenizer.kind, model.config, model.path)


def choose(kind: str, config: Config, path: str | Path) -> Family:
    """The family of the models of a kind of tokenizer and a version, of which files or folders are named so."""
    path = Path(path)
    name = path.parent.name if _NO_NAME.fullmatch(path.name) else path.name
    if kind == "neox":
        return FAMILIES["raven" if _RAVEN.search(name) else "pile"]
    if kind != "world":
        return FAMILIES["rwkv-stream"]
    if config.version == "4":
        return FAMILIES["world-4"]
    return FAMILIES["g1" if _G_MODEL.search(name) else "world"]


def answering(form: Family, sampling: Sampling | None = None) -> Sampling:
    """How answers are sampled: in the family's way or in another, its stop texts among it."""
    chosen = sampling or form.sampling
    return replace(chosen, stop=(*form.stop, *chosen.stop))


def has_learned_to_answer(tokenizer: str) -> bool:
    """Whether models with a tokenizer of this id are trained to answer questions: official ones are, those with a
    vocabulary that `train` made, such as the shipped one, are not."""
    return tokenizer.partition(":")[0] != "bpe"


@dataclass(frozen=True, slots=True)
class Question:
    """A question; `index` is its place among those asked together, which with the seed keys its random numbers;
    `passage` is what is known to answer it, if anything is."""

    text: str
    id: str | None = None
    index: int = 0
    passage: str | None = None


def clean(text: str) -> str:
    """The question as models know them: no outer space, no CR, no blank lines. Raises UsageError if nothing is left."""
    cleaned = re.sub(r"\n+", "\n", text.replace("\r\n", "\n")).strip()
    if not cleaned:
        raise UsageError("asking: expected a question, found an empty one")
    return cleaned


def check_template(template: str) -> str:
    """The same template. Raises UsageError for one without the place of the question."""
    if PLACE not in template:
        raise UsageError(f"asking: expected a prompt template with {PLACE} in it, found '{template}'")
    return template


def fill(template: str, question: str) -> str:
    """The prompt for a question, which is cleaned first. Raises UsageError for a template without its place."""
    return check_template(template).replace(PLACE, clean(question))


def of_part(form: Family, question: str, template: str | None = None) -> str:
    """The prompt for a question after a part of a text, which may not hold the answer."""
    return fill(template or form.template, clean(question) + form.abstaining)


def abstains(answer: str) -> bool:
    """Whether an answer says that there is none, or nothing."""
    return not answer.strip() or _ABSTAINS.fullmatch(answer) is not None


def around(form: Family, question: str, passage: str, order: Order = "both") -> str:
    """A passage with a question after it, before it, or before and after it, up to where the answer begins.

    A state that knows the question while it reads keeps what answers it (Arora et al. 2024, arXiv 2407.05483).
    """
    end = form.template.partition(PLACE)[2]
    after = end if order == "before" else fill(form.template, question)
    before = "" if order == "after" else fill(form.template, question).removesuffix(end).strip() + "\n\n"
    return before + passage + after


def questions(source: str) -> Iterator[Question]:
    """The questions of a file, or of stdin for "-", one by one: one a line, or JSON Lines with `question` and `id`.

    JSON Lines if the name ends with .jsonl or the first line that is not blank starts with "{". Blank lines are left
    out. A question without `id` gets its line number. Raises InputError or UsageError naming the line.
    """
    if source == "-":
        yield from _questions(sys.stdin.buffer, "stdin", is_json=None)
        return
    try:
        file = Path(source).open("rb")  # noqa: SIM115 (only opening may fail in this way)
    except OSError as error:
        raise InputError(f"reading questions from '{source}': {error.strerror or error}") from error
    with file:
        yield from _questions(file, source, is_json=True if source.endswith(".jsonl") else None)


def _questions(file: IO[bytes], source: str, is_json: bool | None) -> Iterator[Question]:
    index = 0
    for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
        where = f"reading questions from '{source}', line {number}"
        if len(line) > LINE_BYTES:
            raise InputError(f"{where}: expected at most {LINE_BYTES} bytes, found more")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at {error.start}"
            raise InputError(f"{where}: expected UTF-8, found {found}") from None
        if not text:
            continue
        if is_json is None:
            is_json = text.startswith("{")
        yield _parsed(text, number, index, where) if is_json else Question(text, str(number), index)
        index += 1
    if index == 0:
        raise InputError(f"reading questions from '{source}': expected a question a line, found none")


def _parsed(text: str, number: int, index: int, where: str) -> Question:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object, found '{text[:40]}' ({error})") from None
    question = record.get("question") if isinstance(record, dict) else None
    if not isinstance(question, str):
        raise InputError(f"{where}: expected an object with the text 'question', found '{text[:40]}'")
    if not question.strip():
        raise UsageError(f"{where}: expected a question, found an empty one")
    given = record.get("id")
    if given is not None and not isinstance(given, str | int):
        raise InputError(f"{where}: expected 'id' to be a text or a whole number, found '{json.dumps(given)[:40]}'")
    return Question(_whole(question), _whole(str(number if given is None else given)), index)


def _whole(text: str) -> str:
    """A text without the halves of characters that JSON may hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
