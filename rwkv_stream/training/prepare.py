"""From a recipe's data to a work folder: the tokenizer, and a file of tokens of each source.

What is there already stays: a preparation that was stopped goes on with the next file.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.files import publish
from rwkv_stream.text import tokenizer as tokenizers
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training import data
from rwkv_stream.training import split as splits
from rwkv_stream.training.data import TokenFile
from rwkv_stream.training.recipe import Data, Recipe
from rwkv_stream.training.split import Split

TOKENIZER = "tokenizer.json"
SAMPLE_CHARACTERS = 20_000  # of a text, that are taken for the tokenizer or not
VALIDATION = "validation"

_log = logging.getLogger(__name__)


def prepare(recipe: Recipe, folder: Path, work: Path, tokenizer: Tokenizer | None = None) -> Tokenizer:
    """Write WORK/tokens/NAME.arrow, and WORK/tokenizer.json where the model brings none; returns the tokenizer.

    folder  that paths of the recipe are relative to
    raises  InputError where data is missing, damaged, or without a token; UsageError where WORK is of other data
    """
    (work / "tokens").mkdir(parents=True, exist_ok=True)
    split = None if recipe.split is None else splits.read(folder / recipe.split)
    if tokenizer is None:
        path = work / TOKENIZER
        if not path.exists() and recipe.tokenizer.path is not None:
            shutil.copyfile(folder / recipe.tokenizer.path, path)
        elif not path.exists():
            publish(path, _made(recipe, folder, split))
        tokenizer = tokenizers.from_file(path)
    for source in recipe.texts:
        found = _documents(recipe, source, folder, split)
        if not _write(work, source.name, found, tokenizer, _origin(recipe, tokenizer, source)):
            raise InputError(f"reading the data '{source.name}': expected text, found none that is trained on")
    measured = recipe.validation
    if measured is None:
        return tokenizer
    if measured.path:
        source = Data(VALIDATION, path=measured.path, text=measured.text)
        found, origin = data.read(source, folder), _origin(recipe, tokenizer, source)
    else:
        parts = (_documents(recipe, source, folder, split, is_held=True) for source in recipe.texts)
        found, origin = chain.from_iterable(parts), _origin(recipe, tokenizer, *recipe.texts)
    if not _write(work, VALIDATION, found, tokenizer, origin):
        _log.warning("nothing is measured: expected a text to measure on, found none among the documents")
    return tokenizer


def path_of(work: Path, name: str) -> Path:
    """The file of tokens of a source."""
    return work / "tokens" / f"{name}.arrow"


def sizes(recipe: Recipe, work: Path) -> dict[str, int]:
    """Name → tokens of each source that is read, as prepared in a work folder."""
    return {data.name: int(TokenFile(path_of(work, data.name)).lengths.sum()) for data in recipe.texts}


def counted(recipe: Recipe, work: Path) -> Recipe:
    """The recipe with tokens in the place of epochs."""
    total = sum(sizes(recipe, work).values())
    stages = (replace(z, tokens=z.tokens or math.ceil(z.epochs * total), epochs=0.0) for z in recipe.stages)
    return replace(recipe, stages=tuple(stages))


def _documents(
    recipe: Recipe, source: Data, folder: Path, split: Split | None, *, is_held: bool = False
) -> Iterator[data.Document]:
    """The documents of a source that are trained on, or those that are held out: every so many-th (pairs together)."""
    every = recipe.validation.held_every if recipe.validation is not None else 0
    size = 2 if source.form == "preferences" else 1
    for i, document in enumerate(data.read(source, folder, split)):
        if (every > 0 and i // size % every == every - 1) is is_held:
            yield document


def _origin(recipe: Recipe, tokenizer: Tokenizer, *sources: Data) -> str:
    """What the tokens in a file follow from, but for the texts themselves."""
    every = recipe.validation.held_every if recipe.validation is not None else 0
    return json.dumps([[asdict(replace(source, weight=1.0)) for source in sources], every, tokenizer.id])


def _write(work: Path, name: str, found: Iterator[data.Document], tokenizer: Tokenizer, origin: str) -> int:
    """Write the file of tokens of that name, if it is not there; how many tokens it has."""
    path = path_of(work, name)
    if not path.exists():
        data.write(path, (data.encoded(document, tokenizer.encode) for document in found), origin)
    file = TokenFile(path)
    if file.origin not in ("", origin):
        raise UsageError(
            f"preparing the data '{name}': expected '{path}' to be of the same data and tokenizer, found another; "
            "remove it or take another folder"
        )
    count = int(file.lengths.sum())
    _log.info("%s: %d tokens", name, count)
    return count


def _made(recipe: Recipe, folder: Path, split: Split | None) -> bytes:
    """A byte-level BPE of the recipe's size, made from a sample of its texts."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    rng = np.random.default_rng(recipe.seed)

    def pieces() -> Iterator[str]:
        for source in recipe.texts:
            for document in _documents(recipe, source, folder, split):
                text = "".join(piece.text for piece in document)
                for start in range(0, len(text), SAMPLE_CHARACTERS):
                    if rng.random() < recipe.tokenizer.sample:
                        yield text[start : start + SAMPLE_CHARACTERS]

    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizers.OWN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.tokenizer.vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(pieces(), trainer)
    _log.info("tokenizer: %d entries", made.get_vocab_size())
    return made.to_str().encode()
