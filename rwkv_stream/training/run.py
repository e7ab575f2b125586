"""A training run: it is a work folder, is stopped at any moment, and goes on from its last checkpoint bit for bit.

    WORK/tokenizer.json, tokens/NAME.arrow    what `prepare` made of the recipe's data
    WORK/checkpoint.pt                        parameters, optimisers, running mean, states and places of the lanes
    WORK/metrics.parquet, curves.png          a row a step, and drawn
    WORK/model.safetensors                    the result so far, as the program loads it: `--model WORK`; of a LoRA
                                              lora.pth, of a tuned state state.pth

On a CPU with glibc, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment keep
memory from going back to the system between steps.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rwkv_stream.errors import UsageError
from rwkv_stream.files import publish, publishing
from rwkv_stream.model.state import State
from rwkv_stream.text.tokenizer import Tokenizer
from rwkv_stream.training.data import TokenFile
from rwkv_stream.training.held import Held, held_pairs, held_texts
from rwkv_stream.training.lanes import IGNORED, Batch, Between, Cursor, Lanes, Made, Repeats, Source, Texts
from rwkv_stream.training.loss import Network
from rwkv_stream.training.optimizers import Average, Optimizers
from rwkv_stream.training.preferences import Pairs, Preferences
from rwkv_stream.training.prepare import VALIDATION, path_of, sizes
from rwkv_stream.training.recipe import Recipe, Stage
from rwkv_stream.training.tuned import Tuned

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.parquet"


@dataclass(frozen=True, slots=True)
class Measured:
    """One step.

    loss           nats a learnt token; of preferences, a pair
    gradient_norm  before clipping
    seconds        of the step, without what is saved and measured
    held_loss      and what follows: on held texts, after steps where that was measured; see `Held`
    """

    step: int
    stage: int
    tokens: int
    learnt: int
    rate: float
    loss: float
    gradient_norm: float
    seconds: float
    held_loss: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None


_NUMBERS = ("rate", "loss", "gradient_norm", "seconds", "held_loss", "bits_per_byte", "accuracy")
_SCHEMA = pa.schema(
    [
        *((name, pa.int64()) for name in ("step", "stage", "tokens", "learnt")),
        *((name, pa.float64()) for name in _NUMBERS),
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
        before: Tuned | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        backend: str = "auto",
    ) -> None:
        """before: the model as it was, to which preferences are compared

        raises  UsageError where the checkpoint is of another recipe, but for stages that have not begun
        """
        self.work, self.recipe, self.tuned = work, recipe, tuned
        self.network = Network(tuned, dtype, backend, checkpoints=recipe.checkpoints)
        on_gpu = self.network.device.type == "cuda"
        self._held_dtype = dtype if on_gpu else torch.float32  # in which a result is loaded there
        self.before = before
        self._tokenizer, self._backend = tokenizer, backend
        self._loss: Callable[[Batch, State], tuple[Tensor, State]] = self.network.loss
        if recipe.is_of_preferences:
            self._loss = self._preferences(self.network, dtype).loss
        self._optimizers = Optimizers(tuned.parameters, recipe.optimizer)
        self._average = Average(tuned.parameters, recipe.optimizer.average) if recipe.optimizer.average else None
        self.step = self.tokens = 0
        self.measured: list[Measured] = []
        self._cursor = Cursor()
        self._lanes: Lanes | Pairs | None = None
        self._stage_index, self._state = -1, self.network.start(0)
        if (work / CHECKPOINT).exists():
            self._go_on(torch.load(work / CHECKPOINT, map_location=self.network.device, weights_only=True))

    def _preferences(self, network: Network, dtype: torch.dtype) -> Preferences:
        if self.before is None:
            raise UsageError(
                "training on preferences: expected a model to compare with, found none; give the path of a checkpoint "
                "in [model]"
            )
        return Preferences(network, Network(self.before, dtype, self._backend), self.recipe.beta)

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
        if self.metrics.exists():
            rows = pq.read_table(self.metrics, schema=_SCHEMA).to_pylist()
            self.measured = [Measured(**row) for row in rows if row["step"] <= self.step]

    def _check_recipe(self, kept: str) -> None:
        """What has been done must have been done by this recipe; what comes may change."""
        before, now = json.loads(kept), json.loads(json.dumps(asdict(self.recipe)))
        done = self.recipe.stage_at(self.step)[0]
        free = {"stages", "data", "validation", "save_every", "checkpoints"}
        changed = [name for name in before if name not in free and not _is_kept(before[name], now[name])]
        if not _is_kept(before["stages"][:done], now["stages"][:done]):
            changed.append("stages that are over")
        if changed:
            raise UsageError(
                f"going on with the training in '{self.work}': expected the recipe that it began with, found other "
                f"{', '.join(changed)}; restore these or take another folder"
            )

    def save(self) -> None:
        """Publish the checkpoint, the metrics and the model so far."""
        pq_rows = pa.Table.from_pylist([asdict(row) for row in self.measured], schema=_SCHEMA)
        with publishing(self.metrics) as file:
            pq.write_table(pq_rows, file)
        with publishing(self.work / CHECKPOINT, kind="checkpoint") as file:
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
            result = self.tuned.file()
        publish(self.result, result)

    @property
    def metrics(self) -> Path:
        return self.work / METRICS

    @property
    def result(self) -> Path:
        """The file with what was trained."""
        return self.work / self.tuned.file_name

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
        batch = self._lanes.window(stage.window).to(self.network.device)
        learnt = int((batch.targets != IGNORED).sum())
        loss = self._backward(batch, learnt)
        rate = stage.rate_at(place)
        norm = self._optimizers.step(rate)
        if self._average is not None:
            self._average.step()
        self.step += 1
        self.tokens += len(batch.tokens)
        row = Measured(self.step, index, self.tokens, learnt, rate, loss.item(), norm, time.perf_counter() - started)
        self.measured.append(row)
        return row

    def _backward(self, batch: Batch, learnt: int) -> Tensor:
        """The loss of a batch with so many learnt tokens; parameters get its gradients, lanes their new states."""
        loss, self._state = self._loss(batch, self._state)
        torch.autograd.backward(loss)
        return loss

    def _begin(self, index: int, stage: Stage) -> None:
        """A stage's lanes: each begins a stretch of its own shares."""
        self._cursor = Cursor(self._cursor.drawn, {}, [])
        self._lanes, self._stage_index = self._lanes_of(stage), index
        self._state = self.network.start(stage.lanes)

    def _lanes_of(self, stage: Stage) -> Lanes | Pairs:
        if self.recipe.is_of_preferences:
            file = TokenFile(path_of(self.work, self.recipe.data[0].name))
            return Pairs(file, stage.lanes, self._tokenizer, self.recipe.seed, self._cursor)
        sources: dict[str, Source] = {}
        for data in self.recipe.data:
            if data.repeats is not None:
                file = TokenFile(path_of(self.work, data.repeats))
                between = Between(file, data.longest, self.recipe.seed)
                sources[data.name] = Repeats(file, self._tokenizer, self.recipe.seed, between)
            elif data.exercises:
                between = None
                if data.between is not None:
                    file = TokenFile(path_of(self.work, data.between))
                    between = Between(file, data.longest, self.recipe.seed)
                sources[data.name] = Made(data.exercises, self._tokenizer, self.recipe.seed, between)
            else:
                file = TokenFile(path_of(self.work, data.name))
                sources[data.name] = Texts(file, stage.stretch, self._tokenizer, self.recipe.seed)
        weights = {data.name: data.weight * sources[data.name].size for data in self.recipe.data}
        return Lanes(sources, stage.shares or weights, stage.lanes, self._cursor)

    def evaluate(self, tuned: Tuned | None = None) -> Held | None:
        """Measure on the held texts (default: what is trained, its running mean); None where there are none."""
        given, path = self.recipe.validation, path_of(self.work, VALIDATION)
        if given is None or not path.exists():
            return None
        file, size = TokenFile(path), 2 if self.recipe.is_of_preferences else 1
        count = len(file.lengths) // size
        if not count:
            return None
        chosen = range(0, count, max(1, count // given.documents))
        network = Network(tuned or self.tuned, self._held_dtype, self._backend)
        with self._averaged():
            if self.recipe.is_of_preferences:
                pairs = Pairs(file, 1, self._tokenizer, 0, Cursor())
                return held_pairs(self._preferences(network, self._held_dtype), map(pairs.pair, chosen))
            texts = Texts(file, given.longest, self._tokenizer, 0)
            return held_texts(network, map(texts.beginning, chosen), self._tokenizer)


def _is_kept(before: Any, now: Any) -> bool:
    """Whether parts of recipes are equal, but for keys that are newer than the first."""
    if isinstance(before, dict):
        return isinstance(now, dict) and all(_is_kept(value, now.get(name)) for name, value in before.items())
    if isinstance(before, list):
        return len(before) == len(now) and all(map(_is_kept, before, now))
    return bool(before == now)


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
            if held := run.evaluate():
                row = replace(row, held_loss=held.loss, bits_per_byte=held.bits_per_byte, accuracy=held.accuracy)
                run.measured[-1] = row
            run.save()
        if say is not None:
            say(row)
    if run.step % every and run.step < run.recipe.steps:
        run.save()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a whole run would take.

    data              name → tokens of each source that is read
    parameters        that are trained
    tokens, steps     of the whole run
    elapsed_s         of all steps, at the speed of a few of each stage
    peak_memory_bytes of the process, or of its GPU
    """

    data: Mapping[str, int]
    parameters: int
    tokens: int
    steps: int
    elapsed_s: float
    peak_memory_bytes: int


STEPS_TRIED = 3  # of each stage; the first allocates what the others use again


def estimate(run: Run) -> Estimate:
    """Run a few steps of each stage, without saving anything: `run` is not to be used afterwards."""
    stages, elapsed_s = run.recipe.stages, 0.0
    tried = [min(STEPS_TRIED, stage.steps) for stage in stages]
    few = (replace(z, tokens=n * z.lanes * z.window) for z, n in zip(stages, tried, strict=True))
    run.recipe = replace(run.recipe, stages=tuple(few))
    for stage, n in zip(stages, tried, strict=True):
        elapsed_s += min(run.advance().seconds for _ in range(n)) * stage.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if run.network.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.network.device)
    return Estimate(
        sizes(run.recipe, run.work),
        sum(z.numel() for z in run.tuned.parameters.values()),
        sum(stage.steps * stage.lanes * stage.window for stage in stages),
        sum(stage.steps for stage in stages),
        elapsed_s,
        peak,
    )
