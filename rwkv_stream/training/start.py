"""What a run begins with: its texts as tokens, and the model, of which a part is trained."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_stream.model import v7
from rwkv_stream.model.checkpoints import adapters, checkpoint
from rwkv_stream.model.state import State
from rwkv_stream.text import tokenizer as tokenizers
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.parameters import Shape, initial_parameters
from rwkv_stream.training.prepare import TOKENIZER, counted, prepare
from rwkv_stream.training.recipe import Recipe
from rwkv_stream.training.tuned import Tuned, Whole, tuned


@dataclass(frozen=True, slots=True)
class Start:
    """What a run is made of.

    recipe  whose stages say how many tokens they read
    tuned   what is trained
    before  the model as it was, where there was one
    """

    recipe: Recipe
    tokenizer: Tokenizer
    tuned: Tuned
    before: Tuned | None = None


def start(
    recipe: Recipe,
    folder: Path,
    work: Path,
    *,
    tokenizer: str | Path | None = None,
    state: State | None = None,
    device: torch.device | str = "cpu",
) -> Start:
    """Prepare the texts of a recipe in the folder `work`, and its model.

    folder     that paths of the recipe are relative to
    tokenizer  of a checkpoint: as `tokenizer.find` takes it
    state      that readings of a checkpoint start from, of batch 1 (default: its own)
    raises     CheckpointError, TokenizerError, InputError, UsageError
    """
    if recipe.model.path is None:
        given, found = recipe.model, prepare(recipe, folder, work)
        torch.manual_seed(recipe.seed)
        drawn = initial_parameters(Shape(given.n_layer, given.n_embd, found.vocab_size, given.head_size))
        config = v7.config("7", {name: tuple(z.shape) for name, z in drawn.items()})
        return Start(counted(recipe, work), found, Whole(config, {name: z.to(device) for name, z in drawn.items()}))
    file = checkpoint.read(folder / recipe.model.path)
    config = file.config
    found = tokenizers.find(tokenizer, file.path, config.vocab_size, file.container.metadata)
    work.mkdir(parents=True, exist_ok=True)
    beside = (file.path if file.path.is_dir() else file.path.parent) / TOKENIZER
    source = beside if tokenizer is None else Path(tokenizer)
    if source.name.endswith(".json") and source.is_file():
        shutil.copyfile(source, work / TOKENIZER)
    prepare(recipe, folder, work, found)
    initial = (adapters.initial_state(config, file.tensors) if state is None else state).to(device)
    names = [name for name in file.tensors if not name.endswith(checkpoint.TIME_STATE)]
    base = {name: file.tensors[name].read().to(device) for name in names}
    before = Tuned(config, base, initial)
    return Start(counted(recipe, work), found, tuned(recipe.adapter, config, base, initial, recipe.seed), before)
