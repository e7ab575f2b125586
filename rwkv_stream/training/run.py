"""Train a model by a recipe: RWKV-7 over a byte-level BPE, resumable, on a few CPU cores.

    python -m rwkv_stream.training.run prepare RECIPE CORPUS WORK   tokenizer and token files of CORPUS/*.jsonl.zst
    python -m rwkv_stream.training.run train WORK                   train; again to continue from the last checkpoint
    python -m rwkv_stream.training.run export WORK FOLDER           bf16 model.safetensors and tokenizer.json

Every batch row is a lane that reads `segment` windows of one place in a file in order and hands the state from window
to window, so the model learns to use a state older than one window; gradients stop at the window's edge. Which tokens
step n reads is a function of the seed and n alone, so a stopped run continues exactly.
With glibc, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment keep memory from
going back to the system between steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from rwkv_stream import interrupts
from rwkv_stream.errors import UsageError
from rwkv_stream.files import publish, publishing
from rwkv_stream.model.state import State
from rwkv_stream.training import recipe
from rwkv_stream.training.data import Lanes, prepare
from rwkv_stream.training.loss import Network
from rwkv_stream.training.parameters import Shape, initial_parameters, optimizer
from rwkv_stream.training.recipe import Settings

RECIPE, CHECKPOINT = "recipe.toml", "checkpoint.pt"  # in a work folder

_log = logging.getLogger(__name__)


def _like(lanes: Tensor, z: Tensor) -> Tensor:
    """lanes [B] so that they can be laid against z [B, ...]."""
    return lanes.view(-1, *[1] * (z.ndim - 1))


class Run:
    """A training run in a work folder: it exists as WORK/checkpoint.pt and continues from there, bit for bit."""

    def __init__(self, work: Path, settings: Settings | None) -> None:
        """Continue the run of `work`, or begin one with `settings` (which must then be given, and else not)."""
        self.work = work
        self.tokenizer = work / "tokenizer.json"
        checkpoint = work / CHECKPOINT
        if checkpoint.exists() == (settings is not None):
            found = "a run" if checkpoint.exists() else "none"
            raise UsageError(
                f"cannot train in '{work}': expected {'no run' if settings else 'a run'} there, found {found}; "
                "continue it or take another folder"
            )
        if settings is None:
            kept = torch.load(checkpoint, weights_only=True)
            self.settings = Settings(**kept["settings"])
            parameters = kept["parameters"]
        else:
            vocab = len(json.loads(self.tokenizer.read_text())["model"]["vocab"])
            self.settings = settings
            torch.manual_seed(settings.seed)
            parameters = initial_parameters(Shape(settings.n_layer, settings.n_embd, vocab, settings.head_size))
        self.network = Network(parameters)
        given = self.settings
        self._lanes = Lanes(work, given.lanes, given.window, given.segment, given.seed, given.weights)
        self._optimizer = optimizer(self.network.parameters, given.weight_decay)
        self.step = 0
        self._state = self.network.start(given.lanes)
        if settings is None:
            self._optimizer.load_state_dict(kept["optimizer"])
            self.step = kept["step"]
            self._state = State(kept["state"])

    def save(self) -> None:
        """Publish the whole run as WORK/checkpoint.pt (a dict that loads with weights_only)."""
        with publishing(self.work / CHECKPOINT) as file:
            torch.save(
                {
                    "settings": asdict(self.settings),
                    "parameters": {name: tensor.detach() for name, tensor in self.network.parameters.items()},
                    "optimizer": self._optimizer.state_dict(),
                    "step": self.step,
                    "state": dict(self._state),
                },
                file,
            )

    def advance(self) -> tuple[float, float]:
        """One step; returns the loss in nats a token and the norm of the gradient before clipping."""
        rate = self.settings.rate_at(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        tokens, fresh = self._lanes(self.step)
        begun, carried = self.network.start(len(fresh)), self._state
        state = State({name: torch.where(_like(fresh, z), begun[name], z) for name, z in carried.items()})
        loss, self._state = self.network.loss(tokens, state)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(list(self.network.parameters.values()), self.settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), norm.item()

    @torch.no_grad()
    def evaluate(self, windows: int) -> float:
        """Bits per byte of the validation books, over `windows` windows from each of `lanes` evenly spread places."""
        text = np.fromfile(self.work / "valid.u16", dtype="<u2").astype(np.int64)
        facts = json.loads((self.work / "valid.json").read_text())
        lanes, window = self.settings.lanes, self.settings.window
        state, nats = self.network.start(lanes), 0.0
        for i in range(windows):
            starts = [len(text) * lane // lanes + i * window for lane in range(lanes)]
            rows = np.stack([text[(start + np.arange(window + 1)) % len(text)] for start in starts])
            loss, state = self.network.loss(torch.from_numpy(rows), state)
            nats += loss.item()
        bytes_a_token: float = facts["bytes"] / facts["tokens"]
        return nats / windows / math.log(2) / bytes_a_token


def train(run: Run, *, save_every: int, log_every: int = 100, stop: Callable[[], bool] = lambda: False) -> None:
    """Advance `run` to its last step or until `stop`, saving as it goes and at the end; logs the loss."""
    started, begun, loss_sum, largest, since = time.monotonic(), run.step, 0.0, 0.0, 0
    tokens_a_step = run.settings.lanes * run.settings.window
    while run.step < run.settings.last_step and not stop():
        loss, norm = run.advance()
        loss_sum, largest, since = loss_sum + loss, max(largest, norm), since + 1
        if run.step % log_every == 0:
            speed = (run.step - begun) * tokens_a_step / max(time.monotonic() - started, 1e-9)
            _log.info(
                "step %d of %d, %.2f M tokens, loss %.4f, largest gradient %.2f, rate %.2e, %.0f tok/s",
                run.step,
                run.settings.last_step,
                run.step * tokens_a_step / 1e6,
                loss_sum / since,
                largest,
                run.settings.rate_at(run.step),
                speed,
            )
            loss_sum, largest, since = 0.0, 0.0, 0
        if run.step % save_every == 0:
            run.save()
            _log.info("step %d saved, %.4f bits per byte", run.step, run.evaluate(16))
    run.save()


def export(work: Path, folder: Path) -> None:
    """Write the run's model as FOLDER/model.safetensors (bf16, official names and shapes) and FOLDER/tokenizer.json."""
    parameters: dict[str, Tensor] = torch.load(work / CHECKPOINT, weights_only=True)["parameters"]
    tensors = {}
    for name, tensor in parameters.items():
        mixing = tensor.ndim == 1 and not name.endswith((".weight", ".bias"))  # these vectors are kept as (1, 1, C)
        tensors[name] = (tensor.view(1, 1, -1) if mixing else tensor).to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    publish(folder / "model.safetensors", save(tensors))
    publish(folder / "tokenizer.json", (work / "tokenizer.json").read_bytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """The three commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m rwkv_stream.training.run", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make the tokenizer and the token files")
    command.add_argument("recipe", type=Path)
    command.add_argument("corpus", type=Path)
    command.add_argument("work", type=Path)
    command = commands.add_parser("train", help="train, or continue training")
    command.add_argument("work", type=Path)
    command.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    command.add_argument("--finish", type=int, metavar="STEPS", help="let the rate fall now and end in so many steps")
    command = commands.add_parser("export", help="write the model of the last checkpoint")
    command.add_argument("work", type=Path)
    command.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if given.command == "prepare":
        prepare(recipe.read(given.recipe), given.corpus, given.work)
        publish(given.work / RECIPE, given.recipe.read_bytes())
    elif given.command == "export":
        export(given.work, given.folder)
    else:
        is_begun = (given.work / CHECKPOINT).exists()
        settings = None if is_begun else recipe.read(given.work / RECIPE).training
        run = Run(given.work, settings)
        if given.finish:
            run.settings = replace(run.settings, finish_from=run.step, finish_steps=given.finish)
        interrupts.install()
        request = interrupts.StopRequest()
        with request.receiving():
            train(run, save_every=given.save_every, stop=lambda: request.signal_number is not None)


if __name__ == "__main__":
    main()
