"""Train the model that the package ships: RWKV-7 over a byte-level BPE, resumable, on a few CPU cores.

    python -m rwkv_stream.training.train prepare CORPUS WORK    tokenizer and token files from CORPUS/*.jsonl.zst
    python -m rwkv_stream.training.train run WORK --steps 10000 train; run again to continue from the last checkpoint
    python -m rwkv_stream.training.train export WORK FOLDER     bf16 model.safetensors and tokenizer.json

Every batch row is a lane that reads `segment` windows of one place in a file in order and hands the state from window
to window, so the model learns to use a state older than one window; gradients stop at the window's edge. Which tokens
step n reads is a function of the seed and n alone, so a stopped run continues exactly.
With glibc, MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment keep memory from
going back to the system between steps.

Knows the equations from `model/v7.py`; holds what only training needs: the data, initialisation, loss and optimiser.
Initialisation and parameter groups follow BlinkDL/RWKV-LM: RWKV-v7/train_temp/src/model.py.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zstandard
from safetensors.torch import save
from torch import Tensor

from rwkv_stream.errors import InputError, UsageError
from rwkv_stream.files import publish, publishing
from rwkv_stream.kernels import resolve
from rwkv_stream.model import network, v7
from rwkv_stream.model.config import GROUP_NORM_EPS

HEAD_SIZE = 64
VALIDATION = "valid-books"
SHARE_ALIKE = ("encyclopedia", "dialogues", "qa-squad", "qa-dolly")  # their licences would pass to the model's text
# How often a file is read relative to its size; 1 where nothing is said.
WEIGHTS = {
    **{f"books-{i:02}": 1.2 for i in range(5)},
    "textbooks": 0.7,
    "technical": 0.4,
    "logs": 0.7,
    "meetings": 0.6,
    "sum-meetings": 0.6,
    "stories": 3.0,
    "qa-fairytale": 8.0,
}
SUMMARY_QUESTION = "What is the text about?"

_log = logging.getLogger(__name__)


# ---- data


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


def training_files(corpus: Path) -> list[Path]:
    """The files of `corpus` that may be trained on, sorted by name."""
    files = sorted(corpus.glob("*.jsonl.zst"))
    chosen = [path for path in files if not _stem(path).startswith("valid-") and _stem(path) not in SHARE_ALIKE]
    if not chosen:
        raise InputError(f"cannot prepare training data: expected *.jsonl.zst in '{corpus}', found none to train on")
    return chosen


def _stem(path: Path) -> str:
    return path.name.removesuffix(".jsonl.zst")


def prepare(corpus: Path, work: Path, vocab: int, sample: float = 0.12) -> None:
    """Train the tokenizer on a sample of the training texts and write WORK/tokenizer.json, tokens/*.u16, valid.u16."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from rwkv_stream.text.tokenizer import OWN_PATTERN

    work.mkdir(parents=True, exist_ok=True)
    (work / "tokens").mkdir(exist_ok=True)
    files = training_files(corpus)
    rng = np.random.default_rng(0)

    def pieces() -> Iterator[str]:
        for path in files:
            for text in documents(read_records(path)):
                for start in range(0, len(text), 20_000):
                    if rng.random() < sample:
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
        vocab_size=vocab,
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
    validation = [record["text"] for record in read_records(corpus / f"{VALIDATION}.jsonl.zst")]
    count = encode(iter(validation), work / "valid.u16")
    text_bytes = sum(len(text.encode()) for text in validation)
    publish(work / "valid.json", json.dumps({"bytes": text_bytes, "tokens": count}).encode())
    _log.info("%s: %d tokens, %.3f bytes a token", VALIDATION, count, text_bytes / count)


class Lanes:
    """Token windows for every step: `lanes` rows, each reading `segment` windows of one place before it moves on."""

    def __init__(self, work: Path, lanes: int, window: int, segment: int, seed: int) -> None:
        paths = sorted((work / "tokens").glob("*.u16"))
        if not paths:
            raise InputError(
                f"cannot train: expected token files in '{work / 'tokens'}', found none; run `prepare` first"
            )
        self._files = [np.memmap(path, dtype="<u2", mode="r") for path in paths]
        sizes = np.array(
            [len(file) * WEIGHTS.get(path.stem, 1.0) for path, file in zip(paths, self._files, strict=True)]
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


# ---- model


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the names and shapes of the parameters."""

    n_layer: int
    n_embd: int
    vocab_size: int


def ranks(n_embd: int) -> dict[str, int]:
    """Ranks of the four low-rank maps, as BlinkDL's trainer chooses them."""
    factors = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
    return {name: max(32, round(factor * math.sqrt(n_embd) / 32) * 32) for name, factor in factors.items()}


def _orthogonal(rows: int, columns: int, scale: float) -> Tensor:
    gain = math.sqrt(rows / columns) if rows > columns else 1.0
    return torch.nn.init.orthogonal_(torch.empty(rows, columns), gain=gain * scale)


def initial_parameters(shape: Shape) -> dict[str, Tensor]:
    """fp32 parameters by official name (vectors 1-D), drawn from torch's global generator."""
    L, C, V, N = shape.n_layer, shape.n_embd, shape.vocab_size, HEAD_SIZE
    H = C // N
    n = torch.arange(C, dtype=torch.float32)
    ramp, linear = n / C, n / (C - 1) - 0.5
    zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zigzag * zigzag.abs()
    rank = ranks(C)
    p: dict[str, Tensor] = {
        "emb.weight": torch.empty(V, C).uniform_(-1e-4, 1e-4),
        "blocks.0.ln0.weight": torch.ones(C),
        "blocks.0.ln0.bias": torch.zeros(C),
    }
    for i in range(L):
        up, down = i / max(1, L - 1), 1 - i / L  # 0 → 1 and 1 → ~0 with depth
        block: dict[str, Tensor] = {}
        for name in ("ln1", "ln2"):
            block |= {f"{name}.weight": torch.ones(C), f"{name}.bias": torch.zeros(C)}
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            block[f"att.x_{name}"] = 1 - ramp ** (power * down)
        block["att.w0"] = -6 + 6 * (n / (C - 1)) ** (1 + up**0.3) + 0.5 + zigzag * 2.5
        block["att.a0"] = -0.19 + zigzag * 0.3 + linear * 0.4
        if i > 0:
            block["att.v0"] = 0.73 - linear * 0.4
        for name in "wavg" if i > 0 else "wag":
            block[f"att.{name}1"] = torch.zeros(C, rank[name])
            block[f"att.{name}2"] = _orthogonal(rank[name], C, 0.1)
        block["att.k_k"] = 0.71 - linear * 0.1
        block["att.k_a"] = torch.full((C,), 1.02)
        block["att.r_k"] = torch.full((H, N), -0.04)
        for name, scale in {"receptance": 0.5, "key": 0.05, "value": 0.5}.items():
            block[f"att.{name}.weight"] = torch.empty(C, C).uniform_(-scale / C**0.5, scale / C**0.5)
        block["att.output.weight"] = torch.zeros(C, C)
        block["att.ln_x.weight"] = torch.full((C,), ((1 + i) / L) ** 0.7)
        block["att.ln_x.bias"] = torch.zeros(C)
        block["ffn.x_k"] = 1 - ramp ** (down**4)
        block["ffn.key.weight"] = _orthogonal(4 * C, C, 1.0)
        block["ffn.value.weight"] = torch.zeros(C, 4 * C)
        p |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    p |= {"ln_out.weight": torch.ones(C), "ln_out.bias": torch.zeros(C)}
    p["head.weight"] = torch.nn.init.orthogonal_(torch.empty(V, C), gain=0.5 * math.sqrt(V / C))
    return p


def softmax_gradient(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropy over rows, and its gradient by the logits divided by `count`: logits [rows, V]."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    hit = torch.arange(logits.shape[1]) == targets[:, None]
    return -torch.where(hit, log_p, 0.0).sum(), ((log_p.exp() - hit.float()) / count).to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `head` over hidden states, a chunk of tokens at a time: logits are never whole in memory.

    The gradient is computed in the forward pass, where the chunk's logits are at hand.
    """

    CHUNK = 512

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: Callable[..., tuple[Tensor, Tensor]]
    ) -> Tensor:
        """hidden [tokens, C], weight [V, C], targets int64 [tokens] → scalar, in nats a token."""
        x, W, count = hidden.to(torch.bfloat16), weight.to(torch.bfloat16), len(targets)
        d_hidden, d_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, count, HeadLoss.CHUNK):
            part = slice(start, start + HeadLoss.CHUNK)
            loss, d = gradient(x[part] @ W.T, targets[part], count)
            total += loss
            if any(ctx.needs_input_grad):
                torch.mm(d, W, out=d_hidden[part])
                d_weight += d.T @ x[part]
        ctx.save_for_backward(d_hidden, d_weight)
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.float() * gradients[0], d_weight * gradients[0], None, None


Carried = tuple[Tensor, Tensor, Tensor]  # att_x_prev [L, B, C], att_kv [L, B, H, N, N], ffn_x_prev [L, B, C]


def before_wkv(
    x: Tensor, x_prev: Tensor, v_first: Tensor | None, block: network.Block
) -> tuple[network.Before, Tensor]:
    """The half of a block before its recurrence: x [B, T, C], x_prev [B, C]; with the output of ln1."""
    h = network.layer_norm(x, block, "ln1")
    return v7.before_wkv(network.mix_of(h, network.shift(h, x_prev)), block, v_first), h


def after_wkv(
    x: Tensor, y: Tensor, before: network.Before, x_prev: Tensor, block: network.Block
) -> tuple[Tensor, Tensor]:
    """The half of a block after its recurrence: x [B, T, C], y [B, T, H, N]; the new x, and the output of ln2."""
    x = x + v7.after_wkv(y, before, block, GROUP_NORM_EPS)
    h = network.layer_norm(x, block, "ln2")
    return x + v7.channel_mix(network.mix_of(h, network.shift(h, x_prev)), block, h, h), h


class Network:
    """The parameters, and the equations of `model/v7.py` compiled per half-block where asked."""

    def __init__(self, shape: Shape, parameters: dict[str, Tensor], compiled: bool) -> None:
        self.shape = shape
        self.parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
        self._config = v7.config("7", {name: tuple(tensor.shape) for name, tensor in parameters.items()})
        self._wkv = resolve("7", "auto", "cpu")[1].rows
        self._before: Callable[..., Any] = before_wkv
        self._after: Callable[..., Any] = after_wkv
        self._gradient: Callable[..., tuple[Tensor, Tensor]] = softmax_gradient
        if compiled:
            self._gradient = torch.compile(softmax_gradient, dynamic=False)
            self._before = torch.compile(before_wkv, dynamic=False)
            self._after = torch.compile(after_wkv, dynamic=False)

    def zero_state(self, lanes: int) -> Carried:
        L, C = self.shape.n_layer, self.shape.n_embd
        return (
            torch.zeros(L, lanes, C),
            torch.zeros(L, lanes, C // HEAD_SIZE, HEAD_SIZE, HEAD_SIZE),
            torch.zeros(L, lanes, C),
        )

    def loss(self, tokens: Tensor, state: Carried) -> tuple[Tensor, Carried]:
        """Mean nats a token of predicting tokens [B, T + 1] from the state before them; the new state, detached."""
        p = self.parameters
        x = F.layer_norm(
            F.embedding(tokens[:, :-1], p["emb.weight"]),
            (self.shape.n_embd,),
            p["blocks.0.ln0.weight"],
            p["blocks.0.ln0.bias"],
            network.LN_EPS,
        )
        v_first, new = None, []
        for i, (att_x, kv, ffn_x) in enumerate(zip(*state, strict=True)):
            block = self._block(i)
            before, h = self._before(x, att_x, v_first, block)
            v_first = before.v_first
            y, (kv,) = self._wkv(before.inputs, (), (kv,))
            x, h2 = self._after(x, y, before, ffn_x, block)
            new.append((h[:, -1].detach(), kv.detach(), h2[:, -1].detach()))
        x = F.layer_norm(x, (self.shape.n_embd,), p["ln_out.weight"], p["ln_out.bias"], network.LN_EPS)
        loss: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, 1), p["head.weight"], tokens[:, 1:].flatten(), self._gradient
        )
        att, kvs, ffn = (torch.stack(parts) for parts in zip(*new, strict=True))
        return loss, (att, kvs, ffn)

    def _block(self, index: int) -> dict[str, Tensor]:
        """One layer's tensors, matrices rounded to bf16 (products of bf16 are summed in fp32)."""
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): t for name, t in self.parameters.items() if name.startswith(prefix)}
        block = {
            name: t.to(torch.bfloat16) if t.ndim == 2 and name != "att.r_k" else t
            for name, t in own.items()
            if not name.startswith("ln0")
        }
        return v7.prepare(block, self._config)

    def optimizer(self, weight_decay: float) -> torch.optim.AdamW:
        """AdamW: weight decay on matrices only, `w0` at twice the rate; a group's `scale` multiplies the rate."""
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        fast: list[Tensor] = []
        for name, tensor in self.parameters.items():
            matrix = tensor.ndim == 2 and name.endswith(".weight")
            (fast if name.endswith(".w0") else decayed if matrix else plain).append(tensor)
        groups = [
            {"params": decayed, "weight_decay": weight_decay, "scale": 1.0},
            {"params": plain, "weight_decay": 0.0, "scale": 1.0},
            {"params": fast, "weight_decay": 0.0, "scale": 2.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-12, fused=True)


# ---- training


@dataclass(frozen=True, slots=True)
class Settings:
    """What one run is made of; kept in its checkpoint, so that a continued run cannot differ."""

    steps: int
    n_layer: int = 6
    n_embd: int = 192
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


class Run:
    """A training run in a work folder: it exists as WORK/checkpoint.pt and continues from there, bit for bit."""

    def __init__(self, work: Path, settings: Settings | None, *, compiled: bool = True) -> None:
        """Continue the run of `work`, or begin one with `settings` (which must then be given, and else not)."""
        self.work = work
        self.tokenizer = work / "tokenizer.json"
        checkpoint = work / "checkpoint.pt"
        if checkpoint.exists() == (settings is not None):
            found = "a run" if checkpoint.exists() else "none"
            raise UsageError(
                f"cannot train in '{work}': expected {'no run' if settings else 'a run'} there, found {found}; "
                "give --steps to begin a run and leave it out to continue one"
            )
        if settings is None:
            kept = torch.load(checkpoint, weights_only=True)
            self.settings = Settings(**kept["settings"])
            self.network = Network(Shape(**kept["shape"]), kept["parameters"], compiled)
        else:
            vocab = len(json.loads(self.tokenizer.read_text())["model"]["vocab"])
            self.settings = settings
            torch.manual_seed(settings.seed)
            shape = Shape(settings.n_layer, settings.n_embd, vocab)
            self.network = Network(shape, initial_parameters(shape), compiled)
        self._lanes = Lanes(work, self.settings.lanes, self.settings.window, self.settings.segment, self.settings.seed)
        self._optimizer = self.network.optimizer(self.settings.weight_decay)
        self.step = 0
        self._state = self.network.zero_state(self.settings.lanes)
        if settings is None:
            self._optimizer.load_state_dict(kept["optimizer"])
            self.step = kept["step"]
            self._state = kept["state"]

    def save(self) -> None:
        """Publish the whole run as WORK/checkpoint.pt (a dict that loads with weights_only)."""
        with publishing(self.work / "checkpoint.pt") as file:
            torch.save(
                {
                    "settings": asdict(self.settings),
                    "shape": asdict(self.network.shape),
                    "parameters": {name: tensor.detach() for name, tensor in self.network.parameters.items()},
                    "optimizer": self._optimizer.state_dict(),
                    "step": self.step,
                    "state": self._state,
                },
                file,
            )

    def advance(self) -> tuple[float, float]:
        """One step; returns the loss in nats a token and the norm of the gradient before clipping."""
        rate = self.settings.rate_at(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        tokens, fresh = self._lanes(self.step)
        for tensor in self._state:  # [L, lanes, …]
            tensor[:, fresh] = 0
        loss, self._state = self.network.loss(tokens, self._state)
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
        state, nats = self.network.zero_state(lanes), 0.0
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
            speed = (run.step - begun) * tokens_a_step / (time.monotonic() - started)
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
            _log.info("step %d saved, %s %.4f bits per byte", run.step, VALIDATION, run.evaluate(16))
    run.save()


def export(work: Path, folder: Path) -> None:
    """Write the run's model as FOLDER/model.safetensors (bf16, official names and shapes) and FOLDER/tokenizer.json."""
    parameters: dict[str, Tensor] = torch.load(work / "checkpoint.pt", weights_only=True)["parameters"]
    tensors = {}
    for name, tensor in parameters.items():
        mixing = tensor.ndim == 1 and not name.endswith((".weight", ".bias"))  # these vectors are kept as (1, 1, C)
        tensors[name] = (tensor.view(1, 1, -1) if mixing else tensor).to(torch.bfloat16).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    publish(folder / "model.safetensors", save(tensors))
    publish(folder / "tokenizer.json", (work / "tokenizer.json").read_bytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """The three commands of the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m rwkv_stream.training.train", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make the tokenizer and the token files")
    command.add_argument("corpus", type=Path)
    command.add_argument("work", type=Path)
    command.add_argument("--vocab", type=int, default=6144)
    command = commands.add_parser("run", help="train, or continue training")
    command.add_argument("work", type=Path)
    command.add_argument("--steps", type=int, help="begin a run of so many steps (not when continuing)")
    command.add_argument("--layers", type=int, default=6)
    command.add_argument("--width", type=int, default=192)
    command.add_argument("--lanes", type=int, default=4)
    command.add_argument("--rate", type=float, default=3e-3)
    command.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    command.add_argument("--finish", type=int, metavar="STEPS", help="let the rate fall now and end in so many steps")
    command = commands.add_parser("export", help="write the model of the last checkpoint")
    command.add_argument("work", type=Path)
    command.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if given.command == "prepare":
        prepare(given.corpus, given.work, given.vocab)
    elif given.command == "export":
        export(given.work, given.folder)
    else:
        settings = None
        if given.steps:
            settings = Settings(
                given.steps, n_layer=given.layers, n_embd=given.width, lanes=given.lanes, rate=given.rate
            )
        run = Run(given.work, settings)
        if given.finish:
            run.settings = replace(run.settings, finish_from=run.step, finish_steps=given.finish)
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        train(run, save_every=given.save_every, stop=stopped.is_set)


if __name__ == "__main__":
    main()
