"""The loss and its gradients: by kernels and by plain torch, over segments, with masks, in every version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VERSIONS, official_weights, save
from torch import Tensor

from rwkv_stream.kernels import available
from rwkv_stream.kernels.layers import autograd
from rwkv_stream.model import load, v7
from rwkv_stream.model.checkpoints import checkpoint
from rwkv_stream.model.config import Config
from rwkv_stream.model.state import State
from rwkv_stream.training.lanes import IGNORED, Batch
from rwkv_stream.training.loss import Gradient, HeadLoss, Network, softmax_gradient_
from rwkv_stream.training.parameters import Shape, initial_parameters
from rwkv_stream.training.tuned import Whole

needs_cpp = pytest.mark.skipif(available()["cpu"] is not None, reason=f"C++ kernels: {available()['cpu']}")
pytestmark = pytest.mark.usefixtures("one_thread")


def random_7(head_size: int = 32) -> tuple[Config, dict[str, Tensor]]:
    """A model of 2 × 64 and 50 tokens, all of whose parameters show."""
    torch.manual_seed(0)
    begun = initial_parameters(Shape(2, 64, 50, head_size))
    parameters = {name: z + 0.1 * torch.randn_like(z) for name, z in begun.items()}
    return v7.config("7", {name: tuple(z.shape) for name, z in begun.items()}), parameters


def batch(lengths: list[int], start: list[int], keep: list[int], vocab_size: int = 50, seed: int = 1) -> Batch:
    """Segments of random tokens, a third of which is not learnt."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(vocab_size, (2, sum(lengths)), generator=generator)
    targets[torch.rand(sum(lengths), generator=generator) < 0.33] = IGNORED
    return Batch(tokens, targets, torch.tensor(lengths), torch.tensor(start), torch.tensor(keep))


UNEQUAL = batch([7, 1, 33, 90, 20], [0, 3, 3, 1, 2], [2, 3, 4])  # three lanes, the first with three documents


def found_by(network: Network) -> dict[str, Tensor]:
    """Loss, gradients and state after two batches of which the second goes on from the first."""
    _, state = network.loss(batch([40, 40, 40], [3, 3, 3], [0, 1, 2], seed=2), network.start(3))
    loss, state = network.loss(UNEQUAL, state)
    torch.autograd.backward(loss)
    gradients = {name: z.grad for name, z in network.tuned.parameters.items() if z.grad is not None}
    return {"loss": loss.detach(), **state} | gradients


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@needs_cpp
@pytest.mark.parametrize("head_size", [32, 64])
def test_the_kernels_give_the_gradients_of_the_equations(head_size: int) -> None:
    """Unequal segments, some from the initial state and some from a lane's, in fp32 against plain torch."""
    config, parameters = random_7(head_size)
    cpp, plain = (found_by(Network(Whole(config, parameters), torch.float32, z)) for z in ("cpu", "reference"))
    assert cpp.keys() == plain.keys()
    for name, wanted in plain.items():
        assert off(cpp[name], wanted) < 1e-4, name


@needs_cpp
def test_in_bf16_the_kernels_are_as_near_as_plain_torch() -> None:
    config, parameters = random_7()
    gradients = []
    for backend, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), ("cpu", torch.bfloat16)):
        network = Network(Whole(config, parameters), dtype, backend)
        torch.autograd.backward(network.loss(UNEQUAL, network.start(3))[0])
        gradients.append(torch.cat([z.grad.flatten() for z in network.tuned.parameters.values() if z.grad is not None]))
    exact, plain, found = gradients
    assert off(found, exact) < 1.5 * off(plain, exact)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
def test_a_document_is_read_as_if_alone(backend: str) -> None:
    """Its loss and gradients do not depend on what stands before it in its lane."""
    network = Network(Whole(*random_7()), torch.float32, backend)
    together = batch([45, 19], [1, 1], [1])
    losses, gradients = list[Tensor](), list[list[Tensor]]()
    parts = [Batch(*(z[:45] for z in together[:2]), torch.tensor([45]), torch.tensor([1]), torch.tensor([0]))]
    parts.append(Batch(*(z[45:] for z in together[:2]), torch.tensor([19]), torch.tensor([1]), torch.tensor([0])))
    for part in (together, *parts):
        loss, state = network.loss(part, network.start(1), 1.0)
        losses.append(loss)
        gradients.append(list(torch.autograd.grad(loss, list(network.tuned.parameters.values()), allow_unused=True)))
    whole, *alone = losses
    torch.testing.assert_close(whole, alone[0] + alone[1], rtol=1e-6, atol=0)
    for both, one, other in zip(*gradients, strict=True):
        if both is not None:
            assert off(both, one + other) < 1e-5
    _, after = network.loss(together, network.start(1))
    for name in after:
        torch.testing.assert_close(after[name], state[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
def test_a_state_is_carried_from_window_to_window(backend: str) -> None:
    """Two windows are one, but that gradients end between them."""
    network = Network(Whole(*random_7()), torch.float32, backend)
    whole = batch([60], [1], [0])
    state, total = network.start(1), torch.zeros(())
    for begin, end, start in ((0, 24, 1), (24, 60, 0)):
        part = Batch(
            whole.tokens[begin:end],
            whole.targets[begin:end],
            torch.tensor([end - begin]),
            torch.tensor([start]),
            whole.keep,
        )
        loss, state = network.loss(part, state, 1.0)
        total = total + loss
        assert not any(z.requires_grad for z in state.values())
    expected, after = network.loss(whole, network.start(1), 1.0)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for name in after:
        torch.testing.assert_close(after[name], state[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("begin", [0, 1, 2])
def test_lanes_are_read_as_if_alone(begin: int) -> None:
    """Losses of some lanes and of the others add up to that of all, and the states are theirs."""
    network, before = Network(Whole(*random_7()), torch.float32), Network(Whole(*random_7()), torch.float32).start(3)
    before = State(
        {name: torch.randn(z.shape, generator=torch.Generator().manual_seed(1)) for name, z in before.items()}
    )
    whole, after = network.loss(UNEQUAL, before, 1.0)
    total, states = 0.0, []
    for first, last in ((0, begin), (begin, 3)):
        if first < last:
            own = State({name: z[first:last] for name, z in before.items()})
            loss, state = network.loss(UNEQUAL.of_lanes(first, last), own, 1.0)
            total, states = total + loss.item(), [*states, state]
    assert total == pytest.approx(whole.item(), rel=1e-6)
    for name, wanted in after.items():
        torch.testing.assert_close(torch.cat([state[name] for state in states]), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
def test_layers_that_are_computed_again_give_the_same_gradients(backend: str) -> None:
    config, parameters = random_7()
    kept, again = (
        found_by(Network(Whole(config, parameters), torch.bfloat16, backend, checkpoints=z)) for z in (False, True)
    )
    for name, wanted in kept.items():
        assert torch.equal(again[name], wanted), name


def test_only_what_is_learnt_counts() -> None:
    network = Network(Whole(*random_7()), torch.float32)
    nats, _ = network.nats(UNEQUAL, network.start(3))
    is_learnt = UNEQUAL.targets != IGNORED
    loss, _ = network.loss(UNEQUAL, network.start(3))
    assert not nats[~is_learnt].any() and (nats[is_learnt] > 0).all()
    torch.testing.assert_close(loss, nats.sum() / is_learnt.sum(), rtol=1e-6, atol=0)
    nothing = UNEQUAL._replace(targets=torch.full_like(UNEQUAL.targets, IGNORED))
    loss, _ = network.loss(nothing, network.start(3))
    torch.autograd.backward(loss)
    assert loss == 0 and not any(z.grad.any() for z in network.tuned.parameters.values() if z.grad is not None)


@pytest.mark.parametrize("gradient", [softmax_gradient_, pytest.param(autograd.softmax_gradient_, marks=needs_cpp)])
def test_head_loss_and_its_gradient(gradient: Gradient) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(HeadLoss.CHUNK + 5, 64, generator=generator).requires_grad_()
    weight = torch.randn(50, 64, generator=generator).requires_grad_()
    targets = torch.randint(50, (len(hidden),), generator=generator)
    wanted = F.cross_entropy(hidden @ weight.T, targets)
    wanted_gradients = torch.autograd.grad(wanted, (hidden, weight))
    loss = HeadLoss.apply(hidden.bfloat16(), weight, targets, len(targets), gradient)  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
    for found, expected in zip(torch.autograd.grad(loss, (hidden, weight)), wanted_gradients, strict=True):
        assert off(found, expected) < 2e-2, "products in bf16"


def of_checkpoint(path: Path) -> Network:
    file = checkpoint.read(path)
    return Network(Whole(file.config, {name: z.read() for name, z in file.tensors.items()}), torch.float32)


def check_loss_and_gradients(path: Path) -> None:
    """The loss is that of the model's logits, and every parameter has a gradient."""
    model, network = load(path, device="cpu", dtype="fp32", tokenizer="bytes"), of_checkpoint(path)
    given = batch([21, 1, 9], [1, 1, 1], [2], vocab_size=256)
    losses = []
    for tokens, targets in zip(given.tokens.split([21, 1, 9]), given.targets.split([21, 1, 9]), strict=True):
        logits, _ = model.forward(tokens[None], logits="all")
        losses.append(F.cross_entropy(logits[0], targets, reduction="sum", ignore_index=IGNORED))
    loss, _ = network.loss(given, network.start(1), 1.0)
    assert loss.item() == pytest.approx(float(sum(losses)), rel=1e-5)
    torch.autograd.backward(loss)
    unused = {name for name, z in network.tuned.parameters.items() if z.grad is None or not z.grad.any()}
    assert not unused
    assert all(z.grad is not None and z.grad.isfinite().all() for z in network.tuned.parameters.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_has_gradients(version: str, tmp_path: Path) -> None:
    check_loss_and_gradients(save(official_weights(version=version), tmp_path / "model.pth"))


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5.0", "rwkv5.2", "rwkv6", "rwkv7"])
def test_checkpoints_of_others_have_gradients(name: str, tiny_rwkv: Path) -> None:
    check_loss_and_gradients(tiny_rwkv / f"{name}-tiny.pth")


@pytest.mark.parametrize("version", ["4", "5.2", "6"])
def test_gradients_of_versions_are_slopes(version: str, tmp_path: Path) -> None:
    """Along the gradient the loss rises as the gradient says."""
    network = of_checkpoint(save(official_weights(version=version), tmp_path / "model.pth"))
    given, parameters = batch([12, 20], [0, 1], [0], vocab_size=256), network.tuned.parameters
    _, state = network.loss(batch([15], [1], [0], 256, seed=3), network.start(1))
    torch.autograd.backward(network.loss(given, state)[0])
    gradients = {name: z.grad.clone() for name, z in parameters.items() if z.grad is not None}
    length = torch.cat([z.flatten() for z in gradients.values()]).norm()
    step, losses = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, z in gradients.items():
                parameters[name] += (sign if sign > 0 else -2) * step * z / length
            losses.append(network.loss(given, state)[0].item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(length.item(), rel=2e-2)


def test_a_state_of_no_lanes_and_no_kept_segments() -> None:
    network = Network(Whole(*random_7()), torch.float32)
    nats, state = network.nats(
        batch([3, 5], [0, 0], [])._replace(keep=torch.zeros(0, dtype=torch.int64)), network.start(0)
    )
    assert len(nats) == 8 and isinstance(state, State) and state.batch == 0
