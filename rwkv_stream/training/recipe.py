"""What a model is made of: which files of a corpus, and the settings of a run; read from TOML."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from rwkv_stream.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Corpus:
    """
    validation  name of the file that is measured on
    exclude     patterns of the names that are not trained on
    """

    validation: str
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """
    vocab_size  entries of the tokenizer
    sample      share of the texts that it is made from
    """

    vocab_size: int
    sample: float = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What one run is made of; kept in its checkpoint, so that a continued run cannot differ."""

    steps: int
    n_layer: int = 6
    n_embd: int = 192
    head_size: int = 64
    lanes: int = 4
    window: int = 512
    segment: int = 8  # windows that a lane reads on before it starts anew elsewhere
    rate: float = 3e-3
    final_rate: float = 0.03  # of `rate`
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    finish_from: int = 0  # with finish_steps > 0: leave the cosine at this step …
    finish_steps: int = 0  # … and fall in a straight line to the end, which comes so many steps later
    weights: Mapping[str, float] = field(default_factory=dict)  # pattern of names of files → reading relative to size

    @property
    def last_step(self) -> int:
        return self.finish_from + self.finish_steps if self.finish_steps else self.steps

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine over `steps` to `final_rate`, or the line of `finish_from`."""
        if self.finish_steps and step >= self.finish_from:
            left = (self.last_step - step) / self.finish_steps
            return left * self._cosine(self.finish_from) + (1 - left) * self.rate * self.final_rate
        return self._cosine(step)

    def _cosine(self, step: int) -> float:
        wave = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warmup) * (self.final_rate + (1 - self.final_rate) * wave)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a model can be made from again, but for the texts."""

    corpus: Corpus
    tokenizer: Vocabulary
    training: Settings


def read(path: Path) -> Recipe:
    """The recipe in a TOML file, whose tables and keys are the fields above. Raises InputError."""
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the recipe '{path}': {error}") from error
    kinds = get_type_hints(Recipe)
    if tables.keys() != kinds.keys():
        found = ", ".join(tables) or "none"
        raise InputError(f"cannot read the recipe '{path}': expected the tables {', '.join(kinds)}, found {found}")
    return Recipe(**{name: _table(f"'{path}' [{name}]", kind, tables[name]) for name, kind in kinds.items()})


def _table(where: str, kind: type[T], table: dict[str, Any]) -> T:
    hints, given = get_type_hints(kind), {}
    for name, value in table.items():
        if name not in hints:
            raise InputError(f"cannot read the recipe {where}: expected one of {', '.join(hints)}, found '{name}'")
        expected, convert = _KINDS[hints[name]]
        try:
            given[name] = convert(value)
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"cannot read the recipe {where}: expected '{name}' as {expected}, found {value!r}"
            ) from error
    required = [z.name for z in fields(kind) if z.default is MISSING and z.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        raise InputError(f"cannot read the recipe {where}: expected {', '.join(missing)}, found none")
    return kind(**given)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_KINDS: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    int: ("an integer", _integer),
    float: ("a number", _number),
    str: ("a string", _text),
    tuple[str, ...]: ("strings", lambda value: tuple(map(_text, value))),
    Mapping[str, float]: ("numbers", lambda value: {name: _number(number) for name, number in value.items()}),
}
