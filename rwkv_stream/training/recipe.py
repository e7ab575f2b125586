"""What a model is made of: its texts, its tokenizer, its shape, and the stages of its training; read from TOML."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from rwkv_stream.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Data:
    """A source of documents: a file, a folder or a glob of whatever `ingest` reads, records, or exercises.

    name       by which stages give it a share
    path       relative to the recipe
    weight     how often it is read relative to its size, where a stage names no shares
    text       of records: the field with the text
    template   of records: text with {fields}
    learn      of a template: the fields that are learnt from (default: everything); of questions, ["answer"] leaves out
               the passage
    form       "questions": records with context (or title), question and answer; "questions twice": the questions stand
               before the context too; "preferences": records with prompt, chosen and rejected, from which nothing but
               what is preferred is learnt (DPO)
    exercises  kinds of `training.exercises`
    repeats    the name of other data, of whose tokens rows are drawn and repeated
    between    of exercises: the name of other data, of which text stands between what is told and what is asked
    longest    tokens of such text, and of that between two rows, at most
    """

    name: str
    path: str = ""
    weight: float = 1.0
    text: str = "text"
    template: str | None = None
    learn: tuple[str, ...] = ()
    form: Literal["text", "questions", "questions twice", "preferences"] = "text"
    exercises: tuple[str, ...] = ()
    repeats: str | None = None
    between: str | None = None
    longest: int = 256


@dataclass(frozen=True, slots=True)
class Start:
    """Where the model comes from: a checkpoint, or a shape of RWKV-7 whose parameters are drawn.

    path  a checkpoint, relative to the recipe
    """

    path: str | None = None
    n_layer: int = 6
    n_embd: int = 256
    head_size: int = 64


@dataclass(frozen=True, slots=True)
class Adapter:
    """What of the model is trained: the whole, low-rank additions to its matrices (LoRA), or its initial state."""

    kind: Literal["whole", "lora", "state"] = "whole"
    rank: int = 16
    alpha: float = 16.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer of a model from nothing: one that is there, or the byte-level BPE that is made from the data.

    path        a tokenizer.json, relative to the recipe
    vocab_size  entries of the tokenizer that is made
    sample      share of the texts that it is made from
    """

    path: str | None = None
    vocab_size: int = 8192
    sample: float = 1.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training, with its own data, windows and rate.

    tokens    how many it reads, or instead
    epochs    how often it reads the data
    lanes     rows of a step; window: tokens of each in a step, at whose edge gradients end and the state goes on
    stretch   the most tokens of a document that a lane reads in a row
    rate      the learning rate after `warmup` steps; `schedule` says how it falls to `final_rate` of it: not at all, as
              a cosine, or (wsd) in a straight line over the last `decay` of the steps
    shares    name of data → share of the tokens; without any, by size and weight
    """

    tokens: int = 0
    epochs: float = 0.0
    lanes: int = 8
    window: int = 512
    stretch: int = 4096
    rate: float = 2e-3
    warmup: int = 100
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    decay: float = 0.2
    final_rate: float = 0.02
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return -(-self.tokens // (self.lanes * self.window))

    def rate_at(self, step: int) -> float:
        """The learning rate of a step of this stage, counted from 0."""
        falls, left = 1 - self.final_rate, 1.0
        if self.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        elif self.schedule == "wsd":
            left = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.rate * min(1.0, (step + 1) / max(1, self.warmup)) * (self.final_rate + falls * left)


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How gradients become steps.

    name          AdamW, or Muon for the matrices of the blocks and AdamW for the rest
    weight_decay  on matrices only
    clip          the largest norm of a gradient
    average       decay a step of a running mean of the weights (EMA), which is then what is measured and exported
    """

    name: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0
    average: float = 0.0


@dataclass(frozen=True, slots=True)
class Validation:
    """What is measured on: texts of their own, or documents of the data, which are then not trained on.

    path       records or texts as in `Data`
    held       without a path: the share of each source's documents that is held out
    documents  how many of them are measured on, at most `longest` tokens of each
    """

    path: str = ""
    text: str = "text"
    held: float = 0.0
    longest: int = 16_384
    documents: int = 16

    @property
    def held_every(self) -> int:
        """Of how many documents one is held out; 0: none."""
        return 0 if self.path or not self.held else max(2, round(1 / self.held))


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a model can be made from again, but for the texts.

    split        path of the split, relative to the recipe; without one all data is trained on
    save_every   steps between checkpoints
    checkpoints  gradient checkpoints: layers are computed again in the backward pass instead of kept
    beta         of preferences: how much the log-ratio to the model before training counts
    """

    data: tuple[Data, ...]
    stages: tuple[Stage, ...]
    model: Start = Start()
    adapter: Adapter = Adapter()
    tokenizer: Vocabulary = Vocabulary()
    optimizer: Optimizer = Optimizer()
    validation: Validation | None = None
    split: str | None = None
    seed: int = 0
    save_every: int = 200
    checkpoints: bool = False
    beta: float = 0.1

    def stage_at(self, step: int) -> tuple[int, int]:
        """The stage to which a step belongs, and which of its steps it is; after the last, (number of stages, 0)."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, step
            step -= stage.steps
        return len(self.stages), 0

    @property
    def texts(self) -> tuple[Data, ...]:
        """The data that is read and not made."""
        return tuple(data for data in self.data if data.path)

    @property
    def held_every(self) -> int:
        """Of how many documents of the data one is held out; 0: none."""
        return 0 if self.validation is None else self.validation.held_every

    @property
    def is_of_preferences(self) -> bool:
        return any(data.form == "preferences" for data in self.data)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def read(path: Path) -> Recipe:
    """Read the recipe in a TOML file, whose tables and keys are the fields above. Raises InputError."""
    found = table(f"recipe '{path}'", Recipe, load(path))

    def refused(expected: str, wrong: object) -> InputError:
        return InputError(f"reading the recipe '{path}': expected {expected}, found {wrong}")

    names = [data.name for data in found.data]
    if not found.stages or not found.data:
        raise refused("[[data]] and [[stages]], one or more", "none")
    if len(set(names)) < len(names):
        raise refused("different names of data", ", ".join(names))
    if found.is_of_preferences and len(names) > 1:
        raise refused("preferences alone", f"{len(names)} sources of data")
    for data in found.data:
        if sum(map(bool, (data.path, data.exercises, data.repeats))) != 1:
            raise refused(f"a path, exercises or repeats for the data '{data.name}'", "none or several of them")
        if data.repeats is not None and data.repeats not in {z.name for z in found.texts}:
            raise refused(f"the name of data with a path for '{data.name}' to repeat", f"'{data.repeats}'")
        if data.between is not None and data.between not in {z.name for z in found.texts}:
            raise refused(f"the name of data with a path to stand between parts of '{data.name}'", f"'{data.between}'")
    for stage in found.stages:
        if unknown := stage.shares.keys() - set(names):
            raise refused(f"shares of {', '.join(names)}", f"'{min(unknown)}'")
        if (stage.tokens > 0) is (stage.epochs > 0):
            raise refused("tokens or epochs of a stage above 0", f"{stage.tokens} and {stage.epochs}")
        if min(stage.lanes, stage.window, stage.stretch) < 1:
            raise refused("lanes, window and stretch of a stage of 1 or more", stage)
        if sum(stage.shares.get(name, 0.0) for name in names) <= 0 and (stage.shares or not found.texts):
            raise refused("a stage with a share of something", dict(stage.shares))
    return found


def load(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises InputError."""
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"reading '{path}': expected a file, found: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"reading '{path}': expected TOML, found: {error}; correct it there") from error
    return tables


def table(where: str, kind: type[T], values: Any) -> T:
    """`values` as a dataclass, each checked against the type of its field. Raises InputError, which names `where`."""
    if not isinstance(values, Mapping):
        raise InputError(f"reading the {where}: expected a table, found {values!r}")
    hints, given = get_type_hints(kind), {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"reading the {where}: expected one of {', '.join(hints)}, found '{name}'")
        given[name] = _converted(f"{where}, '{name}'", hints[name], value)
    required = [z.name for z in fields(kind) if z.default is MISSING and z.default_factory is MISSING]
    if missing := [name for name in required if name not in given]:
        raise InputError(f"reading the {where}: expected {', '.join(missing)}, found none")
    return kind(**given)


def _converted(where: str, kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return table(where, cast("type[DataclassInstance]", kind), value)
    if origin in (Union, types.UnionType):
        return _converted(where, arguments[0], value)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(f"{where}, entry {i}", arguments[0], item) for i, item in enumerate(value, 1))
    if origin is Mapping and isinstance(value, Mapping):
        return {name: _converted(f"{where}, '{name}'", arguments[1], item) for name, item in value.items()}
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise InputError(f"reading the {where}: expected {_name(kind)}, found {value!r}")


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, "a list" if get_origin(kind) is tuple else "a table")
