"""The texts that a model is made from: a corpus as token files, and windows of them for every step."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from rwkv_stream.errors import InputError
from rwkv_stream.files import publish, publishing
from rwkv_stream.training.recipe import Recipe

SUFFIX = ".jsonl.zst"
SUMMARY_QUESTION = "What is the text about?"

_log = logging.getLogger(__name__)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a `.jsonl.zst` file."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as plain:
        for line in io.TextIOWrapper(plain, encoding="utf-8"):
            yield json.loads(line)


def documents(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The texts to train on: a text as it is; questions after the passage (or title) that they belong to.

    Questions on one passage follow each other as `ask` puts them: `\\n\\nQuestion: …\\nAnswer: …`.
    """
    for passage, group in groupby(records, key=lambda record: record.get("context") or record.get("title") or ""):
        questions = []
        for record in group:
            if "text" in record:
                yield record["text"]
            elif passage:
                question = record.get("question") or SUMMARY_QUESTION
                answer = record.get("long_answer") or record.get("answer") or record["summary"]
                questions.append(f"\n\nQuestion: {question.strip()}\nAnswer: {answer.strip()}")
        if questions:
            yield passage + "".join(questions) + "\n"


def training_files(corpus: Path, exclude: Iterable[str]) -> list[Path]:
    """The files of `corpus` that may be trained on, sorted by name: those whose names no pattern excludes."""
    files = sorted(corpus.glob(f"*{SUFFIX}"))
    chosen = [path for path in files if not any(fnmatchcase(_stem(path), pattern) for pattern in exclude)]
    if not chosen:
        raise InputError(f"cannot prepare training data: expected *{SUFFIX} in '{corpus}', found none to train on")
    return chosen


def _stem(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def prepare(recipe: Recipe, corpus: Path, work: Path) -> None:
    """Train the tokenizer on a sample of the training texts and write WORK/tokenizer.json, tokens/*.u16, valid.u16.

    Raises InputError where `corpus` holds no file to train on, or none to measure on.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from rwkv_stream.text.tokenizer import OWN_PATTERN

    files = training_files(corpus, recipe.corpus.exclude)
    held_out = corpus / f"{recipe.corpus.validation}{SUFFIX}"
    if not held_out.is_file():
        raise InputError(f"cannot prepare training data: expected '{held_out}' to measure on, found no such file")
    (work / "tokens").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)

    def pieces() -> Iterator[str]:
        for path in files:
            for text in documents(read_records(path)):
                for start in range(0, len(text), 20_000):
                    if rng.random() < recipe.tokenizer.sample:
                        yield text[start : start + 20_000]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(OWN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.tokenizer.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces(), trainer)
    publish(work / "tokenizer.json", tokenizer.to_str().encode())
    _log.info("tokenizer: %d entries", tokenizer.get_vocab_size())

    def encode(texts: Iterator[str], path: Path) -> int:
        count = 0
        with publishing(path) as file:
            while batch := list(islice(texts, 32)):
                for encoding in tokenizer.encode_batch(batch):
                    file.write(np.array([0, *encoding.ids], dtype="<u2").tobytes())
                    count += 1 + len(encoding.ids)
        return count

    for path in files:
        count = encode(documents(read_records(path)), work / "tokens" / f"{_stem(path)}.u16")
        _log.info("%s: %d tokens", _stem(path), count)
    validation = [record["text"] for record in read_records(held_out)]
    count = encode(iter(validation), work / "valid.u16")
    text_bytes = sum(len(text.encode()) for text in validation)
    publish(work / "valid.json", json.dumps({"bytes": text_bytes, "tokens": count}).encode())
    _log.info("%s: %d tokens, %.3f bytes a token", recipe.corpus.validation, count, text_bytes / count)


class Lanes:
    """Token windows for every step: `lanes` rows, each reading `segment` windows of one place before it moves on."""

    def __init__(
        self, work: Path, lanes: int, window: int, segment: int, seed: int, weights: Mapping[str, float]
    ) -> None:
        """`weights`: pattern of names → how often a file is read relative to its size; 1 where none fits."""
        paths = sorted((work / "tokens").glob("*.u16"))
        if not paths:
            raise InputError(
                f"cannot train: expected token files in '{work / 'tokens'}', found none; run `prepare` first"
            )
        self._files = [np.memmap(path, dtype="<u2", mode="r") for path in paths]
        sizes = np.array(
            [
                len(file) * next((z for pattern, z in weights.items() if fnmatchcase(path.stem, pattern)), 1.0)
                for path, file in zip(paths, self._files, strict=True)
            ]
        )
        self._chances = sizes / sizes.sum()
        self._lanes, self._window, self._segment, self._seed = lanes, window, segment, seed

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 [lanes, window + 1] and which lanes start anew, bool [lanes]; a start reads token 0 first."""
        rows, fresh = [], []
        for lane in range(self._lanes):
            turn, place = divmod(
                step + lane * self._segment // self._lanes, self._segment
            )  # lanes do not move together
            rng = np.random.default_rng((self._seed, lane, turn))
            file = self._files[rng.choice(len(self._files), p=self._chances)]
            start = rng.integers(max(1, len(file) - self._segment * self._window)) + place * self._window - 1
            row = file[(start + np.arange(self._window + 1)) % len(file)].astype(np.int64)
            if place == 0:
                row[0] = 0
            rows.append(row)
            fresh.append(place == 0)
        return torch.from_numpy(np.stack(rows)), torch.tensor(fresh)
