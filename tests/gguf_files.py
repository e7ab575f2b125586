"""GGUF and rwkv.cpp files made of official weights by the rules of their own converters, for the tests of both readers.

Sources: llama.cpp's convert_hf_to_gguf.py and ggml-quants.c, rwkv.cpp's convert_pytorch_to_ggml.py and FILE_FORMAT.md.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
Kind = gguf.GGMLQuantizationType
Array = NDArray[Any]

# ---- llama.cpp ----

TOP = {"emb.": "token_embd.", "head.": "output.", "ln_out.": "output_norm.", "blocks.0.ln0.": "token_embd_norm."}
INNER = [  # official → theirs, the first that fits
    (r"ln1\.", "attn_norm."),
    (r"ln2\.", "attn_norm_2."),
    (r"att\.ln_x\.", "time_mix_ln."),
    (r"att\.time_maa_([wkvrgx])$", r"time_mix_lerp_\1.weight"),
    (r"att\.time_maa_w([12])$", r"time_mix_w\1.weight"),
    (r"att\.time_faaaa$", "time_mix_first.weight"),
    (r"att\.time_decay(\w*)$", r"time_mix_decay\1.weight"),
    (r"ffn\.time_maa_([kr])$", r"channel_mix_lerp_\1.weight"),
    (r"ffn\.x_k$", "channel_mix_lerp_k.weight"),
    (r"att\.(\w+)\.weight$", r"time_mix_\1.weight"),
    (r"ffn\.(\w+)\.weight$", r"channel_mix_\1.weight"),
    (r"att\.(\w+)$", r"time_mix_\1.weight"),
]
LOW_RANK = r"(time_maa_w|time_decay_w|att\.[wavg])[12]$"


def gguf_tensors(
    weights: Mapping[str, Tensor], *, rescale_every: int = 0, fused: bool = True, block_0_has_v: bool = True
) -> dict[str, Array]:
    """GGUF's names → values in torch's order of axes, as the converter makes them of rwkv6 and rwkv7."""
    is_v7 = "blocks.0.att.r_k" in weights
    order = [f"att.x_{j}" for j in "rwkvag"] if is_v7 else [f"att.time_maa_{j}" for j in "wkvrg"]
    found: dict[str, Array] = {}
    for name, tensor in weights.items():
        value = tensor.numpy()
        if re.search(LOW_RANK, name):
            value = value.swapaxes(-1, -2)
        elif value.shape[:2] == (1, 1) or name.endswith("att.r_k"):
            value = value.reshape(-1)
        for ours, theirs in TOP.items():
            if name.startswith(ours):
                found[name.replace(ours, theirs)] = value
                break
        else:
            _, layer, inner = name.split(".", 2)
            if rescale_every and inner in ("att.output.weight", "ffn.value.weight"):
                value = value / np.float32(2 ** (int(layer) // rescale_every))
            if inner in order and fused:
                if inner == order[0]:
                    rows = [weights[f"blocks.{layer}.{part}"].numpy().reshape(1, 1, -1) for part in order]
                    found[f"blk.{layer}.time_mix_lerp_fused.weight"] = np.stack(rows)
                continue
            pattern, theirs = next(pair for pair in INNER if re.match(pair[0], inner))
            found[f"blk.{layer}.{re.sub(pattern, theirs, inner)}"] = value
    if is_v7 and block_0_has_v:
        for i in "012":
            found[f"blk.0.time_mix_v{i}.weight"] = found[f"blk.0.time_mix_a{i}.weight"]
    return found


def gguf_keys(weights: Mapping[str, Tensor], **changes: Any) -> dict[str, Any]:
    """The keys that the converter writes; `changes` by their last part, None to leave one out."""
    is_v7 = "blocks.0.att.r_k" in weights
    architecture = "rwkv7" if is_v7 else "rwkv6"
    heads = weights["blocks.0.att.r_k" if is_v7 else "blocks.0.att.time_faaaa"]
    keys: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.context_length": 1_048_576,
        f"{architecture}.embedding_length": weights["emb.weight"].shape[1],
        f"{architecture}.block_count": 1
        + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        f"{architecture}.attention.layer_norm_epsilon": 1e-5,
        f"{architecture}.wkv.head_size": heads.shape[1],
        f"{architecture}.attention.head_count": 0,
    }
    for change, value in changes.items():
        key = next((key for key in keys if key.endswith(change)), f"{architecture}.{change}")
        keys[key] = value
    return {key: value for key, value in keys.items() if value is not None}


def write_gguf(
    path: Path,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Array],
    *,
    kind: Kind = Kind.F32,
    alignment: int | None = None,
) -> Path:
    """With every matrix that is quantised in practice, if its rows are long enough, in `kind`, the rest in F32."""
    writer = gguf.GGUFWriter(path, keys["general.architecture"])
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in keys.items():
        if key != "general.architecture":
            match value:
                case float():
                    writer.add_float32(key, value)
                case list():
                    writer.add_array(key, value)
                case str():
                    writer.add_string(key, value)
                case _:
                    writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
    for name, value in tensors.items():
        value = np.ascontiguousarray(value)
        chosen = kind if is_quantised(name, value, kind) else Kind.F32
        writer.add_tensor(name, quantise(value, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def is_quantised(name: str, value: Array, kind: Kind) -> bool:
    is_matrix = value.ndim == 2 and not re.search(r"time_mix_(first|w[12]|decay)", name)
    return is_matrix and value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0


# ---- rwkv.cpp ----

CPP_KINDS = {"FP32": 0, "FP16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9}


def rwkv_cpp_tensors(weights: Mapping[str, Tensor]) -> dict[str, Array]:
    """rwkv.cpp's names → values in torch's order of axes, as its converter makes them."""
    names = weights.keys()
    is_v7, is_v6 = "blocks.0.att.r_k" in names, "blocks.0.att.time_maa_x" in names
    is_v5, has_gate = "blocks.0.att.ln_x.weight" in names, "blocks.0.att.gate.weight" in names
    found: dict[str, Array] = {}
    for name, tensor in weights.items():
        value = tensor.numpy()
        if is_v7:
            if re.search(r"att\.[wavg][12]$", name):
                value = value.T
            if match := re.fullmatch(r"(blocks\.\d+\.att\.)x_[rwkvag]", name):
                rows = [weights[f"{match[1]}x_{j}"].numpy().reshape(1, -1) for j in "rwkvag"]
                name, value = f"{match[1]}x_rwkvag", np.stack(rows)
        elif ".time_" in name:
            value = value.squeeze()
            if is_v6:
                if re.search(LOW_RANK, name):
                    value = value.swapaxes(-1, -2)
                elif name.endswith("time_decay"):
                    value = value.reshape(*weights[name.replace("decay", "faaaa")].shape, 1)
                elif name.endswith("time_faaaa"):
                    value = value[..., None]
            elif is_v5:
                if name.endswith("time_decay"):
                    value = np.exp(-np.exp(value.astype(np.float64))).astype(np.float32)
                if name.endswith("time_first"):
                    value = np.exp(value)
                if name.endswith(("time_decay", "time_first", "time_faaaa")):
                    value = value[..., None] if has_gate else value.reshape(-1, 1, 1)
            elif name.endswith("time_decay"):
                value = -np.exp(value)
        found[name] = value
    return found


def write_rwkv_cpp(path: Path, weights: Mapping[str, Tensor], *, kind: str = "FP32", version: int = 101) -> Path:
    """With every matrix but the embedding and the head, if its rows are long enough, in `kind`, the rest in FP32."""
    V, C = weights["emb.weight"].shape
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    data = struct.pack("<6I", 0x67676D66, version, V, C, n_layer, CPP_KINDS[kind])
    ggml = Kind[kind.replace("FP", "F")]
    for name, value in rwkv_cpp_tensors(weights).items():
        is_matrix = value.ndim == 2 and not name.startswith(("emb", "head")) and ".time_" not in name
        chosen = ggml if is_matrix and value.shape[-1] % gguf.GGML_QUANT_SIZES[ggml][0] == 0 else Kind.F32
        number = CPP_KINDS[kind] if chosen == ggml else 0
        data += struct.pack(f"<3I{value.ndim}I", value.ndim, len(name), number, *reversed(value.shape)) + name.encode()
        data += quantise(np.ascontiguousarray(value), chosen).tobytes()
    path.write_bytes(data)
    return path


# ---- blocks that the package reads and does not write: 256 values in sub-blocks with a scale and perhaps a least ----


def quantise(values: Array, kind: Kind) -> Array:
    """Bytes of blocks along the last axis."""
    if kind not in K_BLOCKS:
        return gguf.quantize(values, kind)
    blocks = [K_BLOCKS[kind](block.astype(np.float64)) for block in values.reshape(-1, 256)]
    return np.frombuffer(b"".join(blocks), np.uint8).reshape(*values.shape[:-1], -1)


def _fp16(*values: float) -> bytes:
    return np.array(values, np.float16).tobytes()


def _bytes(values: Array) -> bytes:
    return values.astype(np.uint8).tobytes()


def _with_least(x: Array, n: int, q_max: int, scale_max: int) -> tuple[float, float, Array, Array, Array]:
    """d, d_least, scales, leasts, codes [256 / n, n] with x about d * scale * code - d_least * least."""
    x = x.reshape(-1, n)
    least = np.maximum(0, -x.min(1))
    d_least = float(np.float16(least.max() / scale_max * 1.001))
    leasts = np.ceil(least / d_least).clip(0, scale_max)
    spread = (x.max(1) + d_least * leasts) / q_max
    d = float(np.float16(spread.max() / scale_max * 1.001))
    scales = np.ceil(spread / d).clip(1, scale_max)
    codes = np.rint((x + (d_least * leasts)[:, None]) / (d * scales)[:, None]).clip(0, q_max)
    return d, d_least, scales.astype(int), leasts.astype(int), codes.astype(int)


def _symmetric(x: Array, q_min: int, scale_max: int) -> tuple[float, Array, Array]:
    """d, scales, codes [16, 16] with x about d * scale * (code + q_min)."""
    x = x.reshape(16, 16)
    step = np.abs(x).max(1) / -(q_min + 1)
    d = float(np.float16(step.max() / scale_max * 1.001))
    scales = np.ceil(step / d).clip(1, scale_max)
    codes = np.rint(x / (d * scales)[:, None]).clip(q_min, -q_min - 1) - q_min
    return d, scales.astype(int), codes.astype(int)


def _packed_scales(s: Array, m: Array) -> bytes:
    """Eight scales and eight leasts of 6 bits each in 12 bytes."""
    return _bytes(np.concatenate([s[:4] | s[4:] >> 4 << 6, m[:4] | m[4:] >> 4 << 6, s[4:] & 15 | (m[4:] & 15) << 4]))


def _two_bits(codes: Array) -> bytes:
    q = (codes & 3).reshape(2, 4, 32)
    return _bytes(q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6)


def _q2_k(x: Array) -> bytes:
    d, d_least, scales, leasts, codes = _with_least(x, 16, 3, 15)
    return _bytes(scales | leasts << 4) + _two_bits(codes) + _fp16(d, d_least)


def _q3_k(x: Array) -> bytes:
    d, scales, codes = _symmetric(x, -4, 31)
    high = (codes >> 2).reshape(8, 32)
    s = scales + 32
    packed = np.concatenate([s[:8] & 15 | (s[8:] & 15) << 4, sum(s[4 * i : 4 * i + 4] >> 4 << 2 * i for i in range(4))])
    return _bytes(sum(high[i] << i for i in range(8))) + _two_bits(codes) + _bytes(packed) + _fp16(d)


def _q4_k(x: Array) -> bytes:
    d, d_least, scales, leasts, codes = _with_least(x, 32, 15, 63)
    return _fp16(d, d_least) + _packed_scales(scales, leasts) + _bytes(codes[::2] | codes[1::2] << 4)


def _q5_k(x: Array) -> bytes:
    d, d_least, scales, leasts, codes = _with_least(x, 32, 31, 63)
    high, low = codes >> 4, codes & 15
    packed = _packed_scales(scales, leasts)
    return _fp16(d, d_least) + packed + _bytes(sum(high[i] << i for i in range(8))) + _bytes(low[::2] | low[1::2] << 4)


def _q6_k(x: Array) -> bytes:
    d, scales, codes = _symmetric(x, -32, 127)
    q = codes.reshape(2, 4, 32)
    low, high = q & 15, q >> 4
    ql = np.stack([low[:, 0] | low[:, 2] << 4, low[:, 1] | low[:, 3] << 4], 1)
    qh = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return _bytes(ql) + _bytes(qh) + _bytes(scales) + _fp16(d)


K_BLOCKS = {Kind.Q2_K: _q2_k, Kind.Q3_K: _q3_k, Kind.Q4_K: _q4_k, Kind.Q5_K: _q5_k, Kind.Q6_K: _q6_k}
