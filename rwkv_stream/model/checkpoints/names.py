"""Names: what every family of checkpoints calls its tensors → the official names and shapes of BlinkDL's files.

A family is a table of its own names; a name that is not in it is refused. The containers of files with official names
and of Hugging Face folders are here, those of GGUF and rwkv.cpp, with their names, beside their readers. Vectors may
come out as `(C)` or `(1, 1, C)`, which `checkpoint` makes one.
Source: huggingface/transformers (models/rwkv, models/rwkv7), BBuf/RWKV-World-HF-Tokenizer (modeling_rwkv5.py,
modeling_rwkv6.py), fla-org/flash-linear-attention (layers/rwkv6.py, layers/rwkv7.py, utils/convert_from_rwkv*.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwkv_stream.errors import CheckpointError
from rwkv_stream.model.checkpoints.sources import Container, Source, Sources, a_few
from rwkv_stream.model.config import GROUP_NORM_EPS, LAYER_NORM_EPS

Form = Callable[[str, Source], Source]  # name (for messages), tensor → the official one
PARTS = ("weight", "bias")
FLA6_ORDER, FLA6_OFFICIAL = "rwkvg", (1, 2, 3, 0, 4)  # where w, k, v, r, g stand in it


@dataclass(frozen=True, slots=True)
class Family:
    """
    outer           its name → official name
    blocks          what comes before a block's number
    inner           its name in a block → official names
    group_norm_eps  of its program, from `config.json` and the head size
    """

    outer: Mapping[str, str]
    blocks: str
    inner: Mapping[str, Mapping[str, Form]]
    group_norm_eps: Callable[[Mapping[str, Any], int], float] = lambda config, head_size: GROUP_NORM_EPS


class OfficialFile(Container):
    """A file with official names, of torch or safetensors; our own say what eps they need."""

    def official(self) -> dict[str, Source]:
        if _family(self.sources) is not None:
            raise CheckpointError(
                "expected official names, found a model in the Hugging Face layout without its 'config.json'; "
                "pass the folder that holds both"
            )
        return dict(self.sources)

    def group_norm_eps(self, version: str, head_size: int) -> float:
        return _number(self.metadata, "group_norm_eps", GROUP_NORM_EPS)


class HuggingFaceFolder(Container):
    """Weights beside a `config.json`, by the names of a family or by official ones."""

    def official(self) -> dict[str, Source]:
        _check_config(self.metadata)
        family = _family(self.sources)
        return dict(self.sources) if family is None else _renamed(self.sources, family)

    def group_norm_eps(self, version: str, head_size: int) -> float:
        family = _family(self.sources)
        if family is None:
            return _number(self.metadata, "group_norm_eps", GROUP_NORM_EPS)
        if version == "4":  # which has no such norm
            return GROUP_NORM_EPS
        return family.group_norm_eps(self.metadata, head_size)


# ---- config.json ----


def _check_config(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where it asks for other numbers than those that are computed here."""
    kind = str(config.get("model_type"))[:80]
    if re.search(r"moe", kind, re.IGNORECASE):
        raise CheckpointError(
            f"expected an RWKV model, found model_type '{kind}' (Flock of Finches, a mixture of experts), whose "
            "routing is not supported; pass a model without experts"
        )
    if re.search(r"qwen|^arwkv", kind, re.IGNORECASE) or config.get("attn") is not None:
        raise CheckpointError(
            f"expected an RWKV model, found a hybrid (model_type '{kind}') with layers of another architecture, which "
            "is not supported; pass an RWKV model"
        )
    for key in ("layer_norm_epsilon", "norm_eps"):
        if (eps := _number(config, key, LAYER_NORM_EPS)) != LAYER_NORM_EPS:
            raise CheckpointError(
                f"expected '{key}' {LAYER_NORM_EPS} in 'config.json', found {eps}, which is not supported"
            )
    expected = {"tie_word_embeddings": False, "use_deep_embed": False, "quantization_config": None}
    for key, value in [*expected.items(), ("hidden_act", "sqrelu")]:
        if (config.get(key) or value) != value:
            raise CheckpointError(
                f"expected '{key}' {value} in 'config.json', found {str(config[key])[:80]}, which is not supported"
            )


def _number(metadata: Mapping[str, Any], key: str, default: float) -> float:
    value = metadata.get(key, default)
    try:
        number = math.nan if isinstance(value, bool) else float(default if value is None else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < 1e6:
        raise CheckpointError(f"expected a number as '{key}', found {str(value)[:80]!r}; get the model again")
    return number


# ---- forms ----


def _same(name: str, source: Source) -> Source:
    return source


def _transposed(name: str, source: Source) -> Source:
    rows, columns = _shape(name, source, None, None)
    return source.map(Tensor.t, (columns, rows))


def _row(index: int, n: int) -> Form:
    def form(name: str, source: Source) -> Source:
        _, width = _shape(name, source, n, None)
        return source.map(lambda tensor: tensor[index], (width,))

    return form


def _fla6_w1(name: str, source: Source) -> Source:
    """(5D, C) in fla's order → (C, 5D) in the official one."""
    ranks, width = _shape(name, source, None, None)
    _check_fifths(name, ranks)
    return source.map(lambda w: w.view(5, -1, width)[[*FLA6_OFFICIAL]].reshape(ranks, width).t(), (width, ranks))


def _fla6_w2(name: str, source: Source) -> Source:
    """(C, 5D) in fla's order → (5, D, C) in the official one."""
    width, ranks = _shape(name, source, None, None)
    _check_fifths(name, ranks)
    return source.map(lambda w: w.t().reshape(5, -1, width)[[*FLA6_OFFICIAL]], (5, ranks // 5, width))


def _check_fifths(name: str, ranks: int) -> None:
    if ranks == 0 or ranks % 5:
        raise CheckpointError(f"expected five low ranks in '{name}', found {ranks} rows; get the file again")


def _shape(name: str, source: Source, *expected: int | None) -> tuple[int, ...]:
    if len(source.shape) != len(expected) or any(
        n is not None and n != found for n, found in zip(expected, source.shape, strict=True)
    ):
        wanted = ", ".join("n" if n is None else str(n) for n in expected)
        raise CheckpointError(f"expected tensor '{name}' as [{wanted}], found {list(source.shape)}; get the file again")
    return source.shape


# ---- families ----


def _plain(*pairs: tuple[str, str]) -> dict[str, Mapping[str, Form]]:
    return {theirs: {official: _same} for theirs, official in pairs}


def _norms(*pairs: tuple[str, str]) -> dict[str, Mapping[str, Form]]:
    return _plain(*((f"{theirs}.{part}", f"{official}.{part}") for theirs, official in pairs for part in PARTS))


FULL_NAMES = {"r": "receptance", "k": "key", "v": "value", "o": "output", "g": "gate"}

RWKV_HF = Family(  # transformers' RWKV-4, and RWKV-5 and 6 in the repositories of the RWKV organisation
    outer={
        "rwkv.embeddings.weight": "emb.weight",
        "rwkv.ln_out.weight": "ln_out.weight",
        "rwkv.ln_out.bias": "ln_out.bias",
        "head.weight": "head.weight",
    },
    blocks="rwkv.blocks.",
    inner=_norms(("pre_ln", "ln0"), ("ln1", "ln1"), ("ln2", "ln2"), ("attention.ln_x", "att.ln_x"))
    | _plain(*((f"attention.{name}.weight", f"att.{name}.weight") for name in FULL_NAMES.values()))
    | _plain(*((f"attention.time_mix_{FULL_NAMES[j]}", f"att.time_mix_{j}") for j in "kvrg"))
    | _plain(*((f"attention.time_maa_{j}", f"att.time_maa_{j}") for j in ("x", "w", "k", "v", "r", "g", "w1", "w2")))
    | _plain(
        *(
            (f"attention.{name}", f"att.{name}")
            for name in ("time_decay", "time_decay_w1", "time_decay_w2", "time_first", "time_faaaa")
        )
    )
    | _plain(*((f"feed_forward.{name}.weight", f"ffn.{name}.weight") for name in ("key", "value", "receptance")))
    | _plain(*((f"feed_forward.time_mix_{FULL_NAMES[j]}", f"ffn.time_mix_{j}") for j in "kr"))
    | _plain(*((f"feed_forward.time_maa_{j}", f"ffn.time_maa_{j}") for j in "kr")),
    group_norm_eps=lambda config, head_size: LAYER_NORM_EPS * _number(config, "head_size_divisor", 8) ** 2,
)

_FLA_OUTER = {
    "model.embeddings.weight": "emb.weight",
    "model.norm.weight": "ln_out.weight",
    "model.norm.bias": "ln_out.bias",
    "lm_head.weight": "head.weight",
}
_FLA_NORMS = _norms(("pre_norm", "ln0"), ("attn_norm", "ln1"), ("ffn_norm", "ln2"), ("attn.g_norm", "att.ln_x"))

FLA_7 = Family(
    outer=_FLA_OUTER,
    blocks="model.layers.",
    inner=_FLA_NORMS
    | _plain(*((f"attn.{j}_proj.weight", f"att.{FULL_NAMES[j]}.weight") for j in "rkvo"))
    | _plain(*((f"attn.{name}", f"att.{name}") for name in ("k_k", "k_a", "r_k", *(f"x_{j}" for j in "rwkvag"))))
    | {"attn.x_x": {f"att.x_{j}": _row(i, 6) for i, j in enumerate("rwkvag")}}  # its first revision
    | {f"attn.{j}_lora.lora.0.weight": {f"att.{j}1": _transposed} for j in "wavg"}
    | {f"attn.{j}_lora.lora.2.weight": {f"att.{j}2": _transposed} for j in "wavg"}
    | _plain(*((f"attn.{j}_lora.lora.2.bias", f"att.{j}0") for j in "wav"))
    | _plain(*((f"ffn.{name}", f"ffn.{name}") for name in ("x_k", "key.weight", "value.weight"))),
    group_norm_eps=lambda config, head_size: LAYER_NORM_EPS * head_size,
)

FLA_6 = Family(  # whose converter gives the norm the right eps in memory alone; `config.json` has 1e-5
    outer=_FLA_OUTER,
    blocks="model.layers.",
    inner=_FLA_NORMS
    | _plain(*((f"attn.{j}_proj.linear.weight", f"att.{FULL_NAMES[j]}.weight") for j in "rkvg"))
    | _plain(("attn.o_proj.weight", "att.output.weight"), ("attn.bonus", "att.time_faaaa"))
    | _plain(("attn.x_proj.0.mu", "att.time_maa_x"), ("attn.w_proj.linear.lora.2.bias", "att.time_decay"))
    | {
        "attn.x_proj.0.linear.weight": {"att.time_maa_w1": _fla6_w1},
        "attn.x_proj.2.weight": {"att.time_maa_w2": _fla6_w2},
        "attn.x_bias": {f"att.time_maa_{j}": _row(i, 5) for i, j in enumerate(FLA6_ORDER)},
        "attn.w_proj.linear.lora.0.weight": {"att.time_decay_w1": _transposed},
        "attn.w_proj.linear.lora.2.weight": {"att.time_decay_w2": _transposed},
    }
    | _plain(*((f"ffn.{name}.linear.weight", f"ffn.{name}.weight") for name in ("key", "receptance")))
    | _plain(("ffn.key.mu", "ffn.time_maa_k"), ("ffn.receptance.mu", "ffn.time_maa_r"))
    | _plain(("ffn.value.weight", "ffn.value.weight")),
)

TRANSFORMERS_7 = Family(  # official names behind a prefix
    outer={f"rwkv7.{name}": name for name in ("emb.weight", "ln_out.weight", "ln_out.bias")}
    | {"head.weight": "head.weight"},
    blocks="rwkv7.blocks.",
    inner=_norms(*((name, name) for name in ("ln0", "ln1", "ln2", "att.ln_x")))
    | _plain(*((f"att.{FULL_NAMES[j]}.weight",) * 2 for j in "rkvo"))
    | _plain(*((f"att.{name}",) * 2 for name in ("k_k", "k_a", "r_k", *(f"x_{j}" for j in "rwkvag"))))
    | _plain(*((f"att.{j}{i}",) * 2 for j in "wavg" for i in "012" if (j, i) != ("g", "0")))
    | _plain(*((f"ffn.{name}",) * 2 for name in ("x_k", "key.weight", "value.weight"))),
    group_norm_eps=FLA_7.group_norm_eps,
)


def _family(names: Sources) -> Family | None:
    """The family whose names these are; None for the official ones, or none at all."""
    if any(name.startswith("rwkv7.") for name in names):
        return TRANSFORMERS_7
    if any(name.startswith("rwkv.") for name in names):
        return RWKV_HF
    if any(name.startswith("model.") for name in names):
        return FLA_6 if any(".attn.x_proj." in name for name in names) else FLA_7
    return None


def _renamed(sources: Sources, family: Family) -> dict[str, Source]:
    found: dict[str, Source] = {}
    unknown = set()
    for name, source in sources.items():
        match = re.fullmatch(re.escape(family.blocks) + r"(\d{1,6})\.(.+)", name)
        if name in family.outer:
            renamed = {family.outer[name]: source}
        elif match is not None and match[2] in family.inner:
            forms = family.inner[match[2]]
            renamed = {f"blocks.{int(match[1])}.{to}": form(name, source) for to, form in forms.items()}
        else:
            unknown.add(name)
            continue
        if twice := found.keys() & renamed.keys():
            raise CheckpointError(
                f"expected each tensor once, found {a_few(twice)} again as '{name:.80}'; get the model again"
            )
        found |= renamed
    if unknown:
        raise CheckpointError(
            f"expected the tensors of an RWKV model in the Hugging Face layout, found {a_few(unknown)} besides, which "
            "would not be used; pass the model without them"
        )
    return found
