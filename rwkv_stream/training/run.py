"""A training run: it exists as a work folder, is stopped at any moment, and goes on from its last checkpoint bit for bit.

    WORK/tokenizer.json, tokens/NAME.arrow    what `prepare` made of the recipe's data
    WORK/checkpoint.pt                        parameters, optimisers, running mean, states and places of the lanes
    WORK/metrics.parquet, curves.png          a row a step, and drawn
    WORK/model.safetensors                    the result so far, as the program loads it: `--model WORK`

On a CPU with glibc, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment keep
memory from going back to the system between steps.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.files import publish, publishing
from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.data import TokenFile
from rwkv_stream.training.lanes import IGNORED, Batch, Cursor, Lanes, Made, Repeats, Source, Texts
from rwkv_stream.training.loss import Network
from rwkv_stream.training.optimizers import Average, Optimizers
from rwkv_stream.training.prepare import VALIDATION, path_of
from rwkv_stream.training.recipe import Recipe, Stage
from rwkv_stream.training.tuned import Tuned

CHECKPOINT, METRICS, MODEL = "checkpoint.pt", "metrics.parquet", "model.safetensors"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """One step: loss in nats a learnt token, norm of the gradient before clipping; bits per byte where it was measured."""

    step: int
    stage: int
    tokens: int
    learnt: int
    rate: float
    loss: float
    gradient_norm: float
    seconds: float
    bits_per_byte: float | None = None


_SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in ("step", "stage", "tokens", "learnt")),
        *((name, pa.float64()) for name in ("rate", "loss", "gradient_norm", "seconds", "bits_per_byte")),
    ]
)


class Run:
    """A run in a work folder, prepared before; it goes on from WORK/checkpoint.pt where there is one."""

    def __init__(
        self,
        work: Path,
        recipe: Recipe,
        tokenizer: Tokenizer,
        tuned: Tuned,
        *,
        dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
    ) -> None:
        """Raises UsageError where the checkpoint is of another recipe, but for stages that have not begun."""
        self.work, self.recipe, self.tuned = work, recipe, tuned
        self.network = Network(tuned, dtype, backend, checkpoints=recipe.checkpoints)
        self._tokenizer = tokenizer
        self._optimizers = Optimizers(tuned.parameters, recipe.optimizer)
        self._average = Average(tuned.parameters, recipe.optimizer.average) if recipe.optimizer.average else None
        self.step = self.tokens = 0
        self.measured: list[Measured] = []
        self._cursor, self._lanes = Cursor(), None
        self._stage_index, self._state = -1, self.network.start(0)
        if (work / CHECKPOINT).exists():
            self._go_on(torch.load(work / CHECKPOINT, weights_only=True))

    def _go_on(self, kept: dict[str, Any]) -> None:
        self.step, self.tokens = kept["step"], kept["tokens"]
        self._check_recipe(kept["recipe"])
        with torch.no_grad():
            for name, tensor in self.tuned.parameters.items():
                tensor.copy_(kept["parameters"][name])
        self._optimizers.load_state_dict(kept["optimizers"])
        if self._average is not None:
            self._average.load(kept["average"], kept["average_steps"])
        self._stage_index, self._state = kept["stage"], State(kept["state"])
        cursor = kept["cursor"]
        self._cursor = Cursor(cursor["drawn"], cursor["given"], [z and tuple(z) for z in cursor["lanes"]])
        if self._stage_index >= 0:
            self._lanes = self._lanes_of(self.recipe.stages[self._stage_index])
        if (self.work / METRICS).exists():
            rows = pq.read_table(self.work / METRICS, schema=_SCHEMA).to_pylist()
            self.measured = [Measured(**row) for row in rows if row["step"] <= self.step]

    def _check_recipe(self, kept: str) -> None:
        """What has been done must have been done by this recipe; what comes may change."""
        before, now = json.loads(kept), json.loads(json.dumps(asdict(self.recipe)))
        done = self.recipe.stage_at(self.step)[0]
        free = {"stages", "data", "validation", "save_every", "checkpoints"}
        changed = [name for name in before if name not in free and before[name] != now[name]]
        if before["stages"][:done] != now["stages"][:done]:
            changed.append("stages that are over")
        if changed:
            raise UsageError(
                f"going on with the training in '{self.work}': expected the recipe that it began with, found other "
                f"{', '.join(changed)}; restore these or take another folder"
            )

    def save(self) -> None:
        """Publish the checkpoint, the metrics and the model so far."""
        pq_rows = pa.Table.from_pylist([asdict(row) for row in self.measured], schema=_SCHEMA)
        with publishing(self.work / METRICS) as file:
            pq.write_table(pq_rows, file)
        with publishing(self.work / CHECKPOINT) as file:
            torch.save(
                {
                    "recipe": json.dumps(asdict(self.recipe)),
                    "parameters": {name: z.detach() for name, z in self.tuned.parameters.items()},
                    "optimizers": self._optimizers.state_dict(),
                    "average": self._average and self._average.mean,
                    "average_steps": self._average and self._average.steps,
                    "step": self.step,
                    "tokens": self.tokens,
                    "stage": self._stage_index,
                    "state": dict(self._state),
                    "cursor": asdict(self._cursor),
                },
                file,
            )
        with self._averaged():
            tensors = {name: z.contiguous() for name, z in self.tuned.file().items()}
        publish(self.work / MODEL, save(tensors))

    def _averaged(self) -> _Exchanged:
        """The parameters as they are measured and exported: their running mean, where there is one."""
        return _Exchanged(self.tuned.parameters, self._average.mean if self._average else {})

    def advance(self) -> Measured:
        """One step of the stage that it belongs to."""
        started = time.perf_counter()
        index, place = self.recipe.stage_at(self.step)
        stage = self.recipe.stages[index]
        if index != self._stage_index or self._lanes is None:
            self._begin(index, stage)
        assert self._lanes is not None
        batch = self._lanes.window(stage.window)
        loss, self._state = self.network.loss(batch, self._state)
        torch.autograd.backward(loss)
        rate = stage.rate_at(place)
        norm = self._optimizers.step(rate)
        if self._average is not None:
            self._average.step()
        self.step += 1
        self.tokens += len(batch.tokens)
        learnt = int((batch.targets != IGNORED).sum())
        row = Measured(
            self.step, index, self.tokens, learnt, rate, loss.item(), norm, time.perf_counter() - started
        )
        self.measured.append(row)
        return row

    def _begin(self, index: int, stage: Stage) -> None:
        """A stage's lanes: each begins a stretch of its own shares."""
        self._cursor = Cursor(self._cursor.drawn, {}, [])
        self._lanes, self._stage_index = self._lanes_of(stage), index
        self._state = self.network.start(stage.lanes)

    def _lanes_of(self, stage: Stage) -> Lanes:
        sources: dict[str, Source] = {}
        for data in self.recipe.data:
            if data.repeats is not None:
                file = TokenFile(path_of(self.work, data.repeats))
                sources[data.name] = Repeats(file, self._tokenizer, self.recipe.seed)
            elif data.exercises:
                sources[data.name] = Made(data.exercises, self._tokenizer, self.recipe.seed)
            else:
                file = TokenFile(path_of(self.work, data.name))
                sources[data.name] = Texts(file, stage.stretch, self._tokenizer, self.recipe.seed)
        weights = {data.name: data.weight * sources[data.name].size for data in self.recipe.data}
        return Lanes(sources, stage.shares or weights, stage.lanes, self._cursor)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte of the validation texts, the states carried from window to window.

        Raises UsageError where the recipe has none.
        """
        given = self.recipe.validation
        if given is None:
            raise UsageError("measuring a model in training: expected [validation] in the recipe, found none")
        path = path_of(self.work, VALIDATION)
        facts = json.loads(path.with_suffix(".json").read_text())
        file = TokenFile(path)
        stage = self.recipe.stages[max(0, self._stage_index)]
        chosen = range(0, len(file.lengths), max(1, len(file.lengths) // given.documents))
        nats = learnt = 0.0
        with self._averaged():
            for document in chosen:
                length = min(given.longest, int(file.lengths[document]))
                state, tokens = self.network.start(1), torch.from_numpy(file.read(document, 0, length).tokens)
                for begin in range(0, length - 1, 8 * stage.window):
                    part = tokens[begin : begin + 8 * stage.window + 1]
                    n = torch.tensor([len(part) - 1])
                    batch = Batch(part[:-1], part[1:], n, torch.tensor([0]), torch.tensor([0]))
                    loss, state = self.network.loss(batch, state, 1.0)
                    nats, learnt = nats + loss.item(), learnt + len(part) - 1
        return nats / learnt / math.log(2) * facts["tokens"] / facts["bytes"]


class _Exchanged:
    """Parameters with other values for the time being."""

    def __init__(self, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        self._parameters, self._values = parameters, values

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self._values.items():
            kept = self._parameters[name].detach().clone()
            self._parameters[name].copy_(value)
            value.copy_(kept)


def train(run: Run, *, stop: Callable[[], bool] = lambda: False, say: Callable[[Measured], None] | None = None) -> None:
    """Advance `run` to its last step or until `stop`, saving and measuring as it goes and at the end."""
    every = run.recipe.save_every
    while run.step < run.recipe.steps and not stop():
        row = run.advance()
        if run.step % every == 0 or run.step == run.recipe.steps:
            if run.recipe.validation is not None:
                run.measured[-1] = row = Measured(**asdict(row) | {"bits_per_byte": run.evaluate()})
            run.save()
        if say is not None:
            say(row)
    if run.step % every:
        run.save()
