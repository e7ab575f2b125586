"""How fast RWKV-7 is trained on a CPU, beside how fast its matrix products alone are.

    python benchmarks/train.py [--shape 6x256x64] [--lanes 8] [--window 512] [--document 0] [--threads 1] [--steps 5]
                               [--json]

A shape is layers x width x head size; several may be given. A step is the loss of a window, its gradients and the
optimiser; with `--document N` a new document begins after every N tokens of a lane. The bound is the time of the step's
products in bf16, forward and both backward, made one by one by torch on matrices of those sizes, measured before and
after every step; both are medians of CPU seconds of the process, so that other work on the machine counts as little as
it can.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch

from rwkv_stream.model import v7
from rwkv_stream.training.lanes import Batch
from rwkv_stream.training.loss import HeadLoss, Network
from rwkv_stream.training.optimizers import Optimizers
from rwkv_stream.training.parameters import Shape, initial_parameters
from rwkv_stream.training.recipe import Optimizer
from rwkv_stream.training.tuned import Whole

VOCAB_SIZE = 8192


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads together."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


class Products:
    """The products of a step: for a matrix [out, in] one with x, one with the gradient, and one of both."""

    def __init__(self, network: Network, tokens: int) -> None:
        read = {name: z for name, z in network.tuned.parameters.items() if not name.endswith(("emb.weight", "r_k"))}
        self._counts = Counter(tuple(z.shape) for z in read.values() if z.ndim == 2)
        self._tokens = tokens

    def __call__(self) -> float:
        """CPU seconds of all of them."""
        return sum(count * self._of(*shape) for shape, count in self._counts.items())

    def _of(self, n_out: int, n_in: int) -> float:
        rows = min(self._tokens, HeadLoss.CHUNK if n_out == VOCAB_SIZE else self._tokens)
        x, d, w = (torch.randn(*shape).bfloat16() for shape in ((rows, n_in), (rows, n_out), (n_out, n_in)))
        return seconds(lambda: (x @ w.T, d @ w, d.T @ x)) * self._tokens / rows


def batch(lanes: int, window: int, document: int) -> Batch:
    """Random tokens; each lane begins with the end of a document, which goes on from its state."""
    edges = [*range(0, window, document or window), window]
    lengths = torch.tensor([end - begin for begin, end in pairwise(edges)]).repeat(lanes)
    start = torch.full((lanes, len(edges) - 1), lanes)
    start[:, 0] = torch.arange(lanes)
    keep = torch.arange(1, lanes + 1) * (len(edges) - 1) - 1
    tokens, targets = torch.randint(VOCAB_SIZE, (2, lanes * window))
    return Batch(tokens, targets, lengths, start.flatten(), keep)


def measured(shape: str, lanes: int, window: int, document: int, steps: int) -> dict[str, object]:
    """Tokens a CPU second of the whole step, and what share its products alone are of it."""
    n_layer, n_embd, head_size = map(int, shape.split("x"))
    torch.manual_seed(0)
    drawn = initial_parameters(Shape(n_layer, n_embd, VOCAB_SIZE, head_size))
    network = Network(Whole(v7.config("7", {name: tuple(z.shape) for name, z in drawn.items()}), drawn))
    optimizers = Optimizers(network.tuned.parameters, Optimizer())
    state, tokens = network.start(lanes), lanes * window
    products, losses = Products(network, tokens), []

    def step() -> None:
        nonlocal state
        loss, state = network.loss(batch(lanes, window, document), state)
        torch.autograd.backward(loss)
        optimizers.step(1e-4)
        losses.append(loss.item())

    for _ in range(2):  # which allocate what the others use again
        step()
        products()
    bounds, times = [products()], []
    for _ in range(steps):
        times.append(seconds(step))
        bounds.append(products())
    whole, bound = statistics.median(times), statistics.median(bounds)
    return {
        "shape": shape,
        "lanes": lanes,
        "window": window,
        "document": document,
        "threads": torch.get_num_threads(),
        "tokens_per_cpu_s": round(tokens / whole, 1),
        "products_alone_per_cpu_s": round(tokens / bound, 1),
        "share_of_products": round(bound / whole, 3),
        "lowest_and_highest_cpu_s": [round(min(times), 3), round(max(times), 3)],
        "losses": [round(loss, 4) for loss in losses],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="LxCxN", help="Default: 6x192x64, 6x256x64, 6x256x32.")
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--document", type=int, default=0, help="Tokens of a document. [default: longer than a window]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="One object for each shape.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for shape in given.shape or ["6x192x64", "6x256x64", "6x256x32"]:
        found = measured(shape, given.lanes, given.window, given.document, given.steps)
        if given.json:
            print(json.dumps(found))
        else:
            print(
                f"{shape}: {found['tokens_per_cpu_s']} tokens a CPU second on {given.threads} threads, "
                f"products alone {found['products_alone_per_cpu_s']}: {found['share_of_products']} of the step",
                flush=True,
            )


if __name__ == "__main__":
    main()
