"""Adapters: small trained files that change a checkpoint as it is loaded, in the forms of RWKV-PEFT.

LoRA: `<matrix>.lora_A` [r, in] and `<matrix>.lora_B` [out, r], and whole tensors that were trained besides. As
RWKV-PEFT's merge script does, `W + alpha / r * B A` takes the dtype of `W`, and a whole tensor replaces the model's;
here the sum is made in fp32 and rounded once, where the script rounds the product first. What the base was quantised to
in training (QLoRA) is in no file and not imitated.

Tuned initial state: `blocks.<i>.att.time_state` [H, N, N] of every layer, what the recurrence starts from; the inputs
of the token before the first stay zero. It is stored [head, value, key]. For RWKV-5 and 6 that is transposed to our
axes, as the `rwkv` package does. For RWKV-7 these are our axes. That is how both kernels that RWKV-PEFT trains it with
take it (flash-linear-attention has [key, value], and it transposes for it); no published file of that kind was
compared, and the `rwkv` package has no code for one.
Source: JL-er/RWKV-PEFT: merge/merge.py, merge/merge_state.py, rwkvt/peft/rwkvLinear.py, rwkvt/operator/rwkvop.py;
BlinkDL/ChatRWKV: rwkv_pip_package/src/rwkv/model.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_stream.errors import CheckpointError, UsageError
from rwkv_stream.model import architectures
from rwkv_stream.model.checkpoints import checkpoint
from rwkv_stream.model.checkpoints.checkpoint import TIME_STATE, Checkpoint, time_states
from rwkv_stream.model.checkpoints.containers import open_container
from rwkv_stream.model.checkpoints.sources import Source, Sources, a_few
from rwkv_stream.model.config import Config
from rwkv_stream.model.state import State

A, B = ".lora_A", ".lora_B"
REFUSED = {
    ".init_lora_A": "the start of a PiSSA training, which changes the base model; merge both files with RWKV-PEFT",
    ".init_lora_B": "the start of a PiSSA training, which changes the base model; merge both files with RWKV-PEFT",
    ".bone": "a Bone adapter, which is not supported; merge it with the RWKV-PEFT that made it",
    ".disha": "a DiSHA (Bone) adapter, which is not supported; merge it with the RWKV-PEFT that made it",
    ".lora_M": "a DoRA adapter, which is not supported; merge it with the program that made it",
}


def adapted(
    file: Checkpoint, lora: str | Path | None, lora_alpha: float | None, state: str | Path | None
) -> tuple[Checkpoint, State, list[str]]:
    """The checkpoint with its adapters; what its readings start from, on the CPU; the adapters' parts of a fingerprint.

    raises  as `merged` and `read_state`
    """
    parts = []
    if lora is not None:
        file, part = merged(file, lora, lora_alpha)
        parts.append(part)
    if state is not None:
        file, part = with_state(file, state)
        parts.append(part)
    return file, initial_state(file.config, file.tensors), parts


# ---- LoRA ----


def merged(file: Checkpoint, path: str | Path, alpha: float | None) -> tuple[Checkpoint, str]:
    """The checkpoint with the LoRA file merged into it, each tensor as it is read; the LoRA's part of a fingerprint.

    alpha   that it was trained with, which no such file tells: needed where there is a pair of A and B
    raises  CheckpointError for a file that is none or does not fit, UsageError for an alpha that is missing or no
            number above 0
    """
    path = Path(path).absolute()
    doing = f"merging LoRA '{path}' into '{file.path}'"
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"{doing}: expected alpha as a number above 0, found {alpha}")
    try:
        found = open_container(path).sources
        unused = architectures.of(file.config.version).UNUSED
        tensors = {**file.tensors, **_changes(file, {name: found[name] for name in found if name not in unused}, alpha)}
    except CheckpointError as error:
        raise CheckpointError(f"{doing}: {error}") from error
    if alpha is None and any(name.endswith(A) for name in found):
        raise UsageError(
            f"{doing}: expected the alpha that it was trained with, which the file does not tell, found none; "
            "pass --lora-alpha"
        )
    return replace(file, tensors=tensors), f"lora {checkpoint.tensors_digest(found)} alpha {alpha and float(alpha)!r}"


def _changes(file: Checkpoint, found: Sources, alpha: float | None) -> dict[str, Source]:
    """Name → source of the model's tensors that a LoRA file changes."""
    for ending, reason in REFUSED.items():
        if any(name.endswith(ending) for name in found):
            raise CheckpointError(f"expected a LoRA file, found {reason}")
    if not found:
        raise CheckpointError("expected a LoRA file, found one without tensors; get it again")
    changed = {}
    for name, source in found.items():
        target = name.removesuffix(A).removesuffix(B)
        if target == name:
            changed[name] = _replacement(name, source, _base(file, name, name))
        elif target + A not in found or target + B not in found:
            raise CheckpointError(f"expected '{target[:80]}{A}' and '{B}', found one of them; get the file again")
        elif name.endswith(A):
            base = _base(file, f"{target}.weight", name)
            changed[f"{target}.weight"] = _sum(target, base, source, found[target + B], alpha or 0.0)
    if both := changed.keys() & found.keys() & {name.removesuffix(A) + ".weight" for name in found if name.endswith(A)}:
        raise CheckpointError(f"expected a matrix whole or as A and B, found both of {a_few(both)}; get the file again")
    return changed


def _base(file: Checkpoint, name: str, given: str) -> Source:
    if name not in file.tensors:
        raise CheckpointError(
            f"expected names of this model (RWKV-{file.config.version}, {file.config.n_layer} layers), found "
            f"'{given[:80]}', which fits none; pass the model that it was trained on"
        )
    return file.tensors[name]


def _replacement(name: str, source: Source, base: Source) -> Source:
    if [length for length in source.shape if length > 1] != [length for length in base.shape if length > 1]:
        raise _shape_error(name, base.shape, source.shape)
    return source.map(lambda tensor: tensor.reshape(base.shape), base.shape)


def _sum(target: str, base: Source, a: Source, b: Source, alpha: float) -> Source:
    """base + alpha / r * b a, in base's dtype."""
    for name, source, length, axis in ((target + A, a, base.shape[-1], 1), (target + B, b, base.shape[0], 0)):
        if len(base.shape) != 2 or len(source.shape) != 2 or source.shape[axis] != length or 0 in source.shape:
            expected = ("r", length) if axis else (length, "r")
            raise _shape_error(name, expected, source.shape)
    rank = a.shape[0]
    if b.shape[1] != rank:
        raise _shape_error(target + B, (base.shape[0], rank), b.shape)

    def read() -> Tensor:
        product = torch.addmm(base.read().float(), b.read().float(), a.read().float(), alpha=alpha / rank)
        return product.to(base.dtype)

    return Source(base.shape, base.dtype, read)


def _shape_error(name: str, expected: Collection[int | str], found: Collection[int]) -> CheckpointError:
    shape = ", ".join(str(length) for length in expected)
    return CheckpointError(
        f"expected '{name[:80]}' as [{shape}], found {list(found)}; pass the model that it was trained on"
    )


# ---- tuned initial states ----


def read_state(file: Checkpoint, path: str | Path) -> State:
    """The tuned initial state in a file, of batch 1, on the CPU. Raises CheckpointError where it does not fit."""
    path = Path(path).absolute()
    config = file.config
    try:
        if config.version == "4":
            raise CheckpointError(
                "expected a model of RWKV-5 to 7, found RWKV-4, whose state has no matrix to tune; pass no state"
            )
        found = open_container(path).sources
        expected = time_states(config)
        if not found.keys() & expected.keys():
            raise CheckpointError(
                f"expected tensors 'blocks.<i>{TIME_STATE}', found {a_few(found.keys())}; "
                "pass a file made by state tuning"
            )
        if missing := expected.keys() - found.keys():
            raise CheckpointError(
                f"expected a state for each of {config.n_layer} layers, found {a_few(missing)} missing; "
                "pass the model that it was tuned for"
            )
        if others := found.keys() - expected.keys():
            raise CheckpointError(
                f"expected states for {config.n_layer} layers alone, found {a_few(others)} besides; "
                "pass the model that it was tuned for"
            )
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise _shape_error(name, shape, found[name].shape)
        return initial_state(config, found)
    except CheckpointError as error:
        raise CheckpointError(f"reading the tuned state '{path}' for '{file.path}': {error}") from error


def with_state(file: Checkpoint, path: str | Path) -> tuple[Checkpoint, str]:
    """The checkpoint with the tuned state in a file; the state's part of a fingerprint. Raises as `read_state`."""
    state = read_state(file, path)
    found = open_container(Path(path).absolute()).sources
    return replace(file, tensors={**file.tensors, **found}), f"initial_state {state.digest()}"


def initial_state(config: Config, tensors: Sources) -> State:
    """What a reading starts from, of batch 1: tuned, where these tensors have `time_state`, else zero."""
    state = State.initial(config)
    names = [name for name in time_states(config) if name in tensors]
    if not names:
        return state
    kv = torch.stack([tensors[name].read().float() for name in names])  # [L, H, value, key]
    kv = kv if config.version.startswith("7") else kv.mT
    return State({**state, "att_kv": kv[None].contiguous()})


def time_states_of(config: Config, initial: State) -> dict[str, Tensor]:
    """The `time_state` of each layer that a reading starts from, as files have them; none of RWKV-4."""
    if config.version == "4":
        return {}
    kv = initial["att_kv"][0]
    kv = kv if config.version.startswith("7") else kv.mT
    return {name: kv[i].contiguous() for i, name in enumerate(time_states(config))}


# ---- fingerprint ----


def fingerprint(base: str, *adapters: str) -> str:
    """Of a model of this fingerprint with these adapters, each told by a line of text; without any, the base's own."""
    if not adapters:
        return base
    return hashlib.sha256(
        "".join(f"{line}\n" for line in ("rwkv-stream adapted 1", base, *adapters)).encode()
    ).hexdigest()
