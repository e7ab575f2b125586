"""How fast RWKV-7 is trained on a CPU, beside how fast its matrix products alone are.

    python benchmarks/train.py [--shape 6x256x64] [--lanes 8] [--window 512] [--threads 1] [--steps 5] [--json]

A shape is layers x width x head size; several may be given. A step is the loss of a window, its gradients and the
optimiser. The bound is the time of the step's products in bf16, forward and both backward, made one by one by torch on
matrices of those sizes, measured before and after every step; both are medians of CPU seconds of the process, so that
other work on the machine counts as little as it can.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch

from rwkv_stream.training.loss import HeadLoss, Network
from rwkv_stream.training.parameters import Shape, initial_parameters, optimizer

VOCAB_SIZE = 8192


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads together."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


class Products:
    """The products of a step: for a matrix [out, in] one with x, one with the gradient, and one of both."""

    def __init__(self, network: Network, tokens: int) -> None:
        read = {name: z for name, z in network.parameters.items() if not name.endswith(("emb.weight", "r_k"))}
        self._counts = Counter(tuple(z.shape) for z in read.values() if z.ndim == 2)
        self._tokens = tokens

    def __call__(self) -> float:
        """CPU seconds of all of them."""
        return sum(count * self._of(*shape) for shape, count in self._counts.items())

    def _of(self, n_out: int, n_in: int) -> float:
        rows = min(self._tokens, HeadLoss.CHUNK if n_out == VOCAB_SIZE else self._tokens)
        x, d, w = (torch.randn(*shape).bfloat16() for shape in ((rows, n_in), (rows, n_out), (n_out, n_in)))
        return seconds(lambda: (x @ w.T, d @ w, d.T @ x)) * self._tokens / rows


def measured(shape: str, lanes: int, window: int, steps: int) -> dict[str, object]:
    """Tokens a CPU second of the whole step, and what share its products alone are of it."""
    n_layer, n_embd, head_size = map(int, shape.split("x"))
    torch.manual_seed(0)
    network = Network(initial_parameters(Shape(n_layer, n_embd, VOCAB_SIZE, head_size)))
    adam, state, tokens = optimizer(network.parameters, 0.1), network.start(lanes), lanes * window
    for group in adam.param_groups:
        group["lr"] = 1e-4
    products, losses = Products(network, tokens), []

    def step() -> None:
        nonlocal state
        loss, state = network.loss(torch.randint(VOCAB_SIZE, (lanes, window + 1)), state)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(network.parameters.values()), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
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
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="One object for each shape.")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for shape in given.shape or ["6x192x64", "6x256x64", "6x256x32"]:
        found = measured(shape, given.lanes, given.window, given.steps)
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
