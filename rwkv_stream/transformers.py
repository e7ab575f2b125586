"""The models of this package as models of Hugging Face's transformers (`pip install 'rwkv-stream[transformers]'`).

>>> import rwkv_stream.transformers
>>> model = AutoModelForCausalLM.from_pretrained(folder, dtype="bf16", device="cpu")
>>> made = model.generate(input_ids, max_new_tokens=20)

Importing this module makes `AutoConfig` and `AutoModelForCausalLM` load folders of model_type rwkv (RWKV-4), rwkv5,
rwkv6, rwkv7 and rwkv_stream here, whoever else had these types; transformers' own `RwkvForCausalLM` remains under that
name. `RwkvStreamForCausalLM.from_pretrained` takes any checkpoint. The weights are those of `rwkv_stream.load`, read
once and no `Parameter`s: there is nothing to train, move or save. Fed are the tokens given and no start token.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.extras import needed
from rwkv_stream.model import Loading, Model, load
from rwkv_stream.model.dtypes import DTYPES
from rwkv_stream.model.state import State

with needed("transformers", "transformers", "using models through transformers", BackendError):
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationConfig,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers import RwkvConfig as Rwkv4Config
    from transformers.modeling_outputs import CausalLMOutputWithPast

LOAD_OPTIONS = {field.name for field in fields(Loading)} - {"path", "dtype"}
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # since 5.24; before
# What `AutoModelForCausalLM` hands on, of no meaning for files that are here.
FOR_THE_HUB = {"_from_auto", "adapter_kwargs", "cache_dir", "force_download", "local_files_only", "proxies", "revision"}
FOR_THE_HUB |= {"token", "trust_remote_code"}


class StateCache:
    """What the model has read, in the place of a key-value cache: `cache` of calls and of their outputs, which is named
    `past_key_values` by transformers before 5.24.

    state    of batch B; `StateCache(snapshot.state())` goes on from a snapshot
    n_tokens columns of `input_ids` that were read into it, padding among them, which `generate` leaves out if it is
             given them again

    A call leaves the cache that it is given as it is, so one cache can be continued many times.
    """

    is_compileable = False
    is_croppable = False  # a state cannot be taken back to an earlier token
    is_linear = (False,)  # of its layers; where all are, `generate` does not leave out what was read

    def __init__(self, state: State, n_tokens: int = 0) -> None:
        self.state, self.n_tokens = state, n_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    def get_max_cache_shape(self) -> int:
        """No limit, as transformers writes it."""
        return -1

    def rows(self, index: Tensor) -> StateCache:
        """The rows of `index` int64 [K], as a cache of its own."""
        return StateCache(
            State({name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.state.items()}),
            self.n_tokens,
        )


class RwkvStreamConfig(PretrainedConfig):
    """Dimensions for transformers to look at; what is computed follows from the checkpoint alone."""

    model_type = "rwkv_stream"


class Rwkv5Config(RwkvStreamConfig):
    model_type = "rwkv5"


class Rwkv6Config(RwkvStreamConfig):
    model_type = "rwkv6"


class Rwkv7Config(RwkvStreamConfig):
    model_type = "rwkv7"


class RwkvStreamForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Model` behind transformers' interface; `rwkv` is that model."""

    config_class = RwkvStreamConfig
    main_input_name = "input_ids"
    _is_stateful = True  # so that `generate` refuses to guess tokens that it may have to take back

    def __init__(self, config: PretrainedConfig, rwkv: Model) -> None:
        super().__init__(config)
        self.rwkv = rwkv

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: PretrainedConfig | None = None,
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> RwkvStreamForCausalLM:
        """Load a checkpoint file or folder of this machine.

        dtype    as in `load`, or torch's
        options  the other fields of `Loading`
        raises   as `load`; UsageError for other options, such as device_map
        """
        dtype = options.pop("torch_dtype", None) or dtype  # its older name
        options = {name: value for name, value in options.items() if name not in FOR_THE_HUB}
        if unknown := options.keys() - LOAD_OPTIONS:
            raise UsageError(
                f"loading '{path}' for transformers: expected options {', '.join(sorted(LOAD_OPTIONS))}, "
                f"found {', '.join(sorted(unknown))}; leave them out"
            )
        if not Path(path).exists():
            raise UsageError(
                f"loading '{path}' for transformers: expected a file or folder of this machine, found none; "
                f"get it with `rwkv-stream model pull {path}`"
            )
        if isinstance(dtype, torch.dtype):
            dtype = next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
        rwkv = load(path, dtype=dtype, **options)
        config = cls.config_class() if config is None else config
        dims = rwkv.config
        config.vocab_size, config.hidden_size, config.num_hidden_layers = dims.vocab_size, dims.n_embd, dims.n_layer
        config.tie_word_embeddings = False
        model = cls(config, rwkv)
        model.eval()
        if (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model

    @property
    def device(self) -> torch.device:
        return self.rwkv.device

    @property
    def dtype(self) -> torch.dtype:
        return self.rwkv.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens [B, T]: logits fp32 [B, T, V], where there is padding 0, and the state as cache.

        attention_mask  [B, T], or with columns of earlier calls before them: 1 for tokens, 0 for padding, which is not
                        read; a row's tokens are together, with padding on either side
        cache           what was read before, of B rows or of one that all go on from; also as past_key_values
        logits_to_keep  0: all positions; n: the last n, [B, n, V]
        labels          [B, T] as transformers has them: -100 does not count; `loss` is the mean of the others, in nats
        raises          UsageError for inputs that make no sense, and for what is not there (hidden states,
                        attentions, embeddings as input, position ids of one's own)
        """
        if unknown := [name for name, value in others.items() if value is not None and value is not False]:
            raise UsageError(
                f"reading tokens: expected no {', '.join(unknown)}, which is not supported here; leave it out"
            )
        if labels is not None and (logits_to_keep or labels.shape != input_ids.shape):
            raise UsageError(
                f"reading tokens: expected labels {list(input_ids.shape)} and all logits, found {list(labels.shape)} "
                f"and logits_to_keep {logits_to_keep}; leave one out"
            )
        if cache is not None and past_key_values is not None:
            raise UsageError(
                "reading tokens: expected a cache once, found it as cache and as past_key_values, its older name; "
                f"pass {CACHE} alone"
            )
        B, T = input_ids.shape
        cache = past_key_values if cache is None else cache
        cache = StateCache(self.rwkv.zero_state(B)) if cache is None else cache
        if not isinstance(cache, StateCache):
            raise UsageError(f"reading tokens: expected {CACHE} as StateCache, found {type(cache).__name__}")
        state = cache.state.repeat(B) if cache.state.batch == 1 else cache.state
        logits, state = self._read(input_ids, attention_mask, state, T if logits_to_keep == 0 else logits_to_keep)
        loss = None
        if labels is not None:
            predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
            loss = F.cross_entropy(predicted, labels[:, 1:].reshape(-1).to(predicted.device), ignore_index=-100)
        kept = None if use_cache is False else StateCache(state, cache.n_tokens + T)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: kept})
        return output.to_tuple() if return_dict is False else output

    def _read(self, tokens: Tensor, mask: Tensor | None, state: State, n_last: int) -> tuple[Tensor, State]:
        """Logits of the last `n_last` positions and the new state."""
        B, T = tokens.shape
        real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask[:, -T:].bool().cpu()
        if real.shape != (B, T):
            raise UsageError(f"reading tokens: expected attention_mask [{B}, {T}] or longer, found {list(real.shape)}")
        if real.all():
            hidden, state = self.rwkv.forward(tokens, state, logits="none")
            return self.rwkv.head(hidden[:, -n_last:]), state
        lengths = real.sum(1)
        first = real.int().argmax(1)
        order = first[:, None] + torch.arange(T)  # where each row's tokens stand, then whatever follows
        if not real.gather(1, order.clamp(max=T - 1))[torch.arange(T) < lengths[:, None]].all():
            raise UsageError(
                "reading tokens: expected the tokens of each row together, found padding between them; "
                "put it before or behind"
            )
        read = tokens.cpu().gather(1, order % T)
        hidden, state = self.rwkv.forward(read, state, logits="none", lengths=lengths)
        place = (torch.arange(T) - first[:, None]) % T
        hidden = hidden[torch.arange(B)[:, None], place.to(hidden.device)][:, -n_last:]
        return self.rwkv.head(hidden) * real[:, -n_last:, None].to(hidden.device), state

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Whether `generate` may begin with a cache of keys and values."""
        return False

    def _reorder_cache(self, cache: StateCache, beam_idx: Tensor) -> StateCache:
        return cache.rows(beam_idx)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise UsageError(
            f"saving '{self.rwkv.path}' through transformers: expected no such call, since its tensors stay in the "
            "checkpoint; write a copy with `rwkv-stream model convert`"
        )

    def _apply(self, *args: Any, **options: Any) -> Any:
        raise UsageError(
            "moving a model to another device or dtype: expected none, since it computes where it was loaded; "
            "pass device= and dtype= to from_pretrained"
        )


class Rwkv4ForCausalLM(RwkvStreamForCausalLM):
    config_class = Rwkv4Config


class Rwkv5ForCausalLM(RwkvStreamForCausalLM):
    config_class = Rwkv5Config


class Rwkv6ForCausalLM(RwkvStreamForCausalLM):
    config_class = Rwkv6Config


class Rwkv7ForCausalLM(RwkvStreamForCausalLM):
    config_class = Rwkv7Config


def register() -> None:
    """Tell the auto classes of these models; done on import."""
    for model in (RwkvStreamForCausalLM, Rwkv4ForCausalLM, Rwkv5ForCausalLM, Rwkv6ForCausalLM, Rwkv7ForCausalLM):
        if model.config_class is not Rwkv4Config:
            AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


register()
