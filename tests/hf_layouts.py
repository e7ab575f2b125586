"""Official weights in the layouts of Hugging Face folders, written here from the converters' own rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def rwkv_hf(weights: Weights) -> dict[str, Tensor]:
    """transformers' RWKV-4, and RWKV-5 and 6 in the repositories of the RWKV organisation."""

    def name(official: str) -> str:
        if official == "head.weight":
            return official
        new = official.replace("emb.", "embeddings.").replace(".ln0.", ".pre_ln.")
        new = new.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        for letter, word in {"k": "key", "v": "value", "r": "receptance", "g": "gate"}.items():
            new = re.sub(f"time_mix_{letter}$", f"time_mix_{word}", new)
        return f"rwkv.{new}"

    return {name(official): tensor for official, tensor in weights.items()}


def transformers_7(weights: Weights) -> dict[str, Tensor]:
    """transformers' own RWKV-7: block 0 has the tensors that nothing reads."""
    C, rank = weights["blocks.1.att.v1"].shape
    unused = {"v0": torch.zeros(1, 1, C), "v1": torch.zeros(C, rank), "v2": torch.zeros(rank, C)}
    held = {**weights, **{f"blocks.0.att.{name}": tensor for name, tensor in unused.items()}}
    return {name if name == "head.weight" else f"rwkv7.{name}": tensor for name, tensor in held.items()}


FLA_OUTER = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
FLA_NORMS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "att.ln_x": "attn.g_norm"}
FLA_PROJ = {"receptance": "r", "key": "k", "value": "v", "output": "o", "gate": "g"}


def fla_7(weights: Weights, *, first_revision: bool = False) -> dict[str, Tensor]:
    """fla's RWKV-7; its first revision has the six mixing vectors as one `x_x` (6, C)."""
    found = {}
    for official, tensor in weights.items():
        if official in FLA_OUTER:
            found[FLA_OUTER[official]] = tensor
            continue
        _, i, name = official.split(".", 2)
        layer = f"model.layers.{i}"
        norm, _, part = name.rpartition(".")
        if norm in FLA_NORMS:
            found[f"{layer}.{FLA_NORMS[norm]}.{part}"] = tensor
        elif match := re.fullmatch(r"att\.([wavg])([012])", name):
            place = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[match[2]]
            found[f"{layer}.attn.{match[1]}_lora.lora.{place}"] = tensor.view(-1) if match[2] == "0" else tensor.t()
        elif match := re.fullmatch(r"att\.(receptance|key|value|output)\.weight", name):
            found[f"{layer}.attn.{FLA_PROJ[match[1]]}_proj.weight"] = tensor
        elif match := re.fullmatch(r"att\.(x_[rwkvag])", name):
            found[f"{layer}.attn.{match[1]}"] = tensor
        elif name.startswith("att."):
            found[f"{layer}.attn.{name[4:]}"] = tensor if name.endswith("r_k") else tensor.view(-1)
        else:
            found[f"{layer}.{name}"] = tensor.view(-1) if name == "ffn.x_k" else tensor
    if first_revision:
        for i in {name.split(".")[2] for name in found if name.startswith("model.layers.")}:
            parts = [found.pop(f"model.layers.{i}.attn.x_{j}").view(-1) for j in "rwkvag"]
            found[f"model.layers.{i}.attn.x_x"] = torch.stack(parts)
    return found


def fla_6(weights: Weights) -> dict[str, Tensor]:
    """fla's RWKV-6, whose fused tensors are in the order r, w, k, v, g."""
    found = {theirs: weights[official] for official, theirs in FLA_OUTER.items()}
    for i in {name.split(".")[1] for name in weights if name.startswith("blocks.")}:
        start = f"blocks.{i}."
        block = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
        norms = {
            f"{theirs}.{part}": block[f"{norm}.{part}"]
            for norm, theirs in FLA_NORMS.items()
            for part in ("weight", "bias")
            if f"{norm}.{part}" in block
        }
        C = block["ln1.weight"].shape[0]
        w, k, v, r, g = block["att.time_maa_w1"].view(C, 5, -1).unbind(1)
        down = torch.cat([r, w, k, v, g], dim=1).t()
        w, k, v, r, g = block["att.time_maa_w2"].unbind(0)
        up = torch.cat([r, w, k, v, g], dim=0).t()
        layer = norms | {
            "attn.x_proj.0.mu": block["att.time_maa_x"].view(-1),
            "attn.x_proj.0.linear.weight": down,
            "attn.x_proj.2.weight": up,
            "attn.x_bias": torch.stack([block[f"att.time_maa_{j}"].view(-1) for j in "rwkvg"]),
            "attn.w_proj.linear.lora.0.weight": block["att.time_decay_w1"].t(),
            "attn.w_proj.linear.lora.2.weight": block["att.time_decay_w2"].t(),
            "attn.w_proj.linear.lora.2.bias": block["att.time_decay"].view(-1),
            "attn.bonus": block["att.time_faaaa"],
            "attn.o_proj.weight": block["att.output.weight"],
            "ffn.key.linear.weight": block["ffn.key.weight"],
            "ffn.key.mu": block["ffn.time_maa_k"].view(-1),
            "ffn.value.weight": block["ffn.value.weight"],
            "ffn.receptance.linear.weight": block["ffn.receptance.weight"],
            "ffn.receptance.mu": block["ffn.time_maa_r"].view(-1),
        }
        for name in ("receptance", "key", "value", "gate"):
            layer[f"attn.{FLA_PROJ[name]}_proj.linear.weight"] = block[f"att.{name}.weight"]
        found |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return found


LAYOUTS: dict[str, Callable[[Weights], dict[str, Tensor]]] = {
    "rwkv_hf": rwkv_hf,
    "fla_6": fla_6,
    "fla_7": fla_7,
    "fla_7, first revision": lambda weights: fla_7(weights, first_revision=True),
    "transformers_7": transformers_7,
}
OF_VERSION = {  # version → its layouts
    "4": ["rwkv_hf"],
    "5.0": ["rwkv_hf"],
    "5.1": ["rwkv_hf"],
    "5.2": ["rwkv_hf"],
    "6": ["rwkv_hf", "fla_6"],
    "7": ["fla_7", "fla_7, first revision", "transformers_7"],
}


def config_of(weights: Weights, version: str, layout: str) -> dict[str, Any]:
    """A `config.json` with what such folders say, sizes left to the tensors where they may be."""
    V, C = weights["emb.weight"].shape
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    config: dict[str, Any] = {"vocab_size": V, "hidden_size": C, "num_hidden_layers": n_layer, "use_cache": True}
    config |= {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float32"}
    number = version[0]
    if layout == "rwkv_hf":
        config |= {"architectures": [f"Rwkv{'' if number == '4' else number}ForCausalLM"]}
        config |= {"model_type": "rwkv" if number == "4" else f"rwkv{number}", "layer_norm_epsilon": 1e-05}
        return config | {"intermediate_size": None, "attention_hidden_size": C, "rescale_every": 6}
    config |= {"model_type": f"rwkv{number}", "norm_eps": 1e-05}
    if layout == "transformers_7":
        H, N = weights["blocks.0.att.r_k"].shape
        return config | {"architectures": ["Rwkv7ForCausalLM"], "num_heads": H, "head_dim": N, "use_deep_embed": False}
    config |= {"architectures": [f"RWKV{number}ForCausalLM"], "hidden_act": "sqrelu", "attn": None, "norm_first": True}
    if number == "7":
        return config | {"head_dim": 64, "value_dim": [C] * n_layer, "hidden_ratio": 3.0, "norm_bias": True}
    return config | {"expand_k": 1.0, "expand_v": 1.0, "num_heads": len(weights["blocks.0.att.time_faaaa"])}


def save_folder(
    folder: Path,
    tensors: Weights,
    config: Mapping[str, Any],
    *,
    parts: int = 1,
    container: str = "model.safetensors",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `config.json` beside the tensors: one file, or several with their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stored = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    stem, suffix = container.split(".")
    names, where = sorted(stored), {}
    for i in range(parts):
        file = container if parts == 1 else f"{stem}-{i + 1:05}-of-{parts:05}.{suffix}"
        held = {name: stored[name] for name in names[i::parts]}
        where |= dict.fromkeys(held, file)
        if suffix == "bin":
            torch.save(held, folder / file)
        else:
            safetensors.torch.save_file(held, folder / file, metadata={"format": "pt"})
    if parts > 1:
        size = sum(tensor.nbytes for tensor in stored.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / f"{container}.index.json").write_text(json.dumps(index, indent=2))
    return folder


def save_layout(folder: Path, weights: Weights, version: str, layout: str, **options: Any) -> Path:
    """A folder of official `weights` in one of the layouts of their version; options as for `save_folder`."""
    config = config_of(weights, version, layout) | options.pop("config", {})
    return save_folder(folder, LAYOUTS[layout](weights), config, **options)
