"""Layers on several devices and in host memory give what they give on one; here all devices are the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import official_weights, save

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.kernels import KERNELS
from rwkv_stream.model import Model, architectures, load, network, placement
from rwkv_stream.model.placement import PipedState, Stage, Streamed, n_resident, shares

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
N_LAYER = 5


def model_of(version: str, folder: Path) -> Model:
    return load(save(official_weights(version=version, n_layer=N_LAYER), folder / "model.pth"), backend="reference")


def piped(model: Model, counts: Sequence[int]) -> Model:
    stages, blocks = [], list(model.blocks)
    for count in counts:
        stages.append(Stage(CPU, blocks[:count]))
        blocks = blocks[count:]
    return dataclasses.replace(model, stages=stages)


def streamed(model: Model, resident: int) -> Model:
    return dataclasses.replace(model, stages=[Stage(CPU, Streamed(model.blocks, CPU, resident))])


def same_readings(model: Model, other: Model) -> None:
    """In two calls, the second from the state of the first, padded; and in packed segments."""
    tokens = torch.randint(model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    lengths, state, other_state = torch.tensor([7, 23]), None, None
    for part, given in ((tokens[:, :17], None), (tokens[:, 17:], lengths)):
        wanted, state = model.forward(part, state, lengths=given)
        found, other_state = other.forward(part, other_state, lengths=given)
        assert torch.equal(found, wanted)
        assert all(torch.equal(other_state[name], state[name]) for name in state)
        assert other_state.digest() == state.digest()
    assert state is not None and other_state is not None
    start = torch.tensor([1, 0, 1])
    hidden, new = model.forward_packed(tokens[0], torch.tensor([12, 1, 27]), state, start=start, keep=start[:2])
    also, other_new = other.forward_packed(
        tokens[0], torch.tensor([12, 1, 27]), other_state, start=start, keep=start[:2]
    )
    assert torch.equal(also, hidden)
    assert all(torch.equal(other_new[name], new[name]) for name in new)


@pytest.mark.parametrize("counts", [(5,), (3, 2), (1, 1, 3)])
@pytest.mark.parametrize("version", KERNELS)
def test_a_pipe_of_stages(version: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    model = model_of(version, tmp_path)
    pipe = piped(model, counts)
    same_readings(model, pipe)
    _, state = pipe.forward(torch.zeros(3, 2, dtype=torch.int64))
    assert isinstance(state, PipedState) == (len(counts) > 1)
    assert (state.batch, state.nbytes) == (3, pipe.zero_state(3).nbytes)
    if isinstance(state, PipedState):
        assert [part["att_x_prev"].shape[1] for part in state.parts] == list(counts)
    tokens = torch.ones(3, 1, dtype=torch.int64)
    wanted, _ = model.forward(tokens, state)
    for other in (pipe, piped(model, (2, 2, 1)), piped(model, (1, 4))):  # its own parts, or others
        assert torch.equal(other.forward(tokens, state)[0], wanted)
    with pytest.raises(UsageError, match="expected a state of 2 rows"):
        pipe.forward(torch.zeros(2, 1, dtype=torch.int64), state)


@pytest.mark.parametrize("resident", [0, 1, N_LAYER - 1, N_LAYER])
@pytest.mark.parametrize("version", KERNELS)
def test_layers_from_host_memory(version: str, resident: int, tmp_path: Path) -> None:
    model = model_of(version, tmp_path)
    same_readings(model, streamed(model, resident))


def test_no_more_than_two_streamed_layers_are_there(tmp_path: Path) -> None:
    """The third one takes the place of the first; the resident ones stay."""
    model = model_of("7", tmp_path)
    layers = Streamed(model.blocks, CPU, 1)
    places = []
    for block, wanted in zip(layers, model.blocks, strict=True):
        assert set(block) == set(wanted)
        assert all(torch.equal(block[name], wanted[name]) for name in wanted)
        assert all(block[name].data_ptr() % 64 == wanted[name].data_ptr() % 64 for name in ("att.key.weight",))
        places.append(block["att.key.weight"].data_ptr())
    assert places[1] == places[3] != places[2] == places[4]
    assert places[0] not in places[1:]
    assert len(layers) == N_LAYER
    for block, wanted in zip(layers[1:3], model.blocks[1:3], strict=True):
        assert torch.equal(block["ffn.key.weight"], wanted["ffn.key.weight"])


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize("n_layer", [1, 3])
def test_the_first_layers_are_a_model(version: str, n_layer: int, tmp_path: Path) -> None:
    """Their states are those of the whole; what comes out is the residual stream, of mean 0 and variance 1."""
    model = model_of(version, tmp_path)
    part = model.first(n_layer)
    tokens = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    _, state = model.forward(tokens)
    hidden, found = part.forward(tokens, logits="none")
    assert found.digest() == state.first(n_layer).digest()
    rows = network.Rows(tokens, part.initial.repeat(2), None)
    blocks, architecture = model.blocks[:n_layer], architectures.of(model.config.version)
    stream, _ = network.layers(architecture, model.config, blocks, network.embed(model.outer, tokens), rows, part.wkv)
    torch.testing.assert_close(hidden, F.layer_norm(stream.x, stream.x.shape[-1:]), rtol=1e-4, atol=1e-4)
    for other in (piped(model, [2, 1, 2]), streamed(model, 0), streamed(model, 2)):
        same_readings(part, other.first(n_layer))
        same_readings(model, other)


def test_layers_that_a_model_has_not(tmp_path: Path) -> None:
    model = model_of("7", tmp_path)
    for n_layer in (0, N_LAYER + 1):
        with pytest.raises(UsageError, match=f"expected 1 to {N_LAYER}, found {n_layer}"):
            model.first(n_layer)


def test_a_reading_that_is_given_up_leaves_the_layers_to_others(tmp_path: Path) -> None:
    model = model_of("7", tmp_path)
    layers = Streamed(model.blocks, CPU, 0)
    begun = iter(layers)
    next(begun)
    begun.close()  # type: ignore[attr-defined]
    assert len(list(layers)) == N_LAYER


def test_how_many_layers_stay(tmp_path: Path) -> None:
    """All where all fit; else what fits beside two places; and never less than the call needs."""
    model = model_of("7", tmp_path)
    blocks, dtype = model.blocks, torch.float32
    layer = max(placement._Layout.of(block).n_bytes for block in blocks)
    call = 1024 * (4 * (14 * model.config.n_embd + model.config.d_ffn) + 40 * model.config.n_embd)

    def found(n_bytes: int) -> int:
        return n_resident(model.config, blocks, 1000, dtype, n_bytes)

    assert found(1 << 40) == N_LAYER
    assert found(1000 + call + 2 * layer) == 0
    assert found(1000 + call + 4 * layer) == 2
    with pytest.raises(UsageError, match="raise --gpu-memory"):
        found(1000 + call + 2 * layer - 1)


def test_shares() -> None:
    assert shares(32, 1) == [32]
    assert shares(32, 3) == [11, 11, 10]
    assert sum(shares(61, 8)) == 61


def test_what_needs_a_gpu_says_so(bytes_model_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a GPU for --gpu-memory, found device cpu"):
        load(bytes_model_path, device="cpu", gpu_memory=1 << 30)
    for names in ("cpu,cpu", "cpu,cuda:0", "cuda:0;cuda:1", "cuda:0,"):
        with pytest.raises((UsageError, BackendError), match=r"choosing (a )?device|using device"):
            load(bytes_model_path, device=names)
