"""The models of this package as models of Hugging Face's transformers (`pip install 'rwkv-stream[transformers]'`).

>>> import rwkv_stream.transformers
>>> model = AutoModelForCausalLM.from_pretrained(folder, dtype="bf16", device="cpu")
>>> made = model.generate(input_ids, max_new_tokens=20)

Importing this module makes `AutoConfig` and `AutoModelForCausalLM` load folders of model_type rwkv (RWKV-4), rwkv5,
rwkv6, rwkv7 and rwkv_stream here, whoever else had these types; transformers' own `RwkvForCausalLM` remains under that
name. `RwkvStreamForCausalLM.from_pretrained` takes any checkpoint. Fed are the tokens given and no start token.

Between `eval()`, in which a model is loaded, and `train()` lies more than a flag. In evaluation a `Model` of this
package reads: it has its own copy of the weights, packed for its kernels, and no gradients. The `Parameter`s are the
tensors of the file, mapped from it, and cost nothing until they are used. With `train()`, or where a module that
multiplies is replaced by one around it (PEFT), the parameters become copies, matrices in the dtype of the products, and
plain torch reads, forward and backward, with the recurrence of the backend. After `eval()` a `Model` is made of what
the parameters have become when it is next asked to read. Whoever writes to parameters by hand calls `train()` before.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_stream.errors import BackendError, UsageError
from rwkv_stream.extras import needed
from rwkv_stream.model import Loading, Model, architectures, load, network
from rwkv_stream.model.dtypes import DTYPES, TABLES, dtype_in_memory
from rwkv_stream.model.loader import initial_of, tensors_of, with_tensors
from rwkv_stream.model.placement import Stage
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


Reading = Callable[[Tensor, State | None, Tensor | None], tuple[list[Tensor], State]]  # tokens, state, lengths


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


@dataclass
class Prepared:
    """The model that reads in evaluation, made of the parameters; None where these may have changed since."""

    model: Model | None = None


class Part(torch.nn.Module):
    """Parameters of a model by the names of checkpoints; all parts of it share what is `prepared` of them.

    That is let go where a module takes the place of another, as when PEFT merges what it has trained.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module):
            self.prepared.model = None
        super().__setattr__(name, value)

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Put a parameter under its name, in modules as PEFT knows them."""
        module: torch.nn.Module = self
        *path, leaf = name.split(".")
        for i, step in enumerate(path):
            if step not in module._modules:
                module.add_module(step, self._part(name if i == len(path) - 1 else "", parameter))
            module = module.get_submodule(step)
        module.register_parameter(leaf, parameter)

    def _part(self, name: str, parameter: torch.nn.Parameter) -> torch.nn.Module:
        """The module of the parameter `name`; without a name, one that holds modules."""
        if name == "emb.weight":
            return torch.nn.Embedding(parameter.shape[0], parameter.shape[1], device="meta")
        if parameter.ndim == 2 and name.endswith(".weight") and not name.endswith(TABLES):
            return torch.nn.Linear(parameter.shape[1], parameter.shape[0], bias=False, device="meta")
        return Part(self.prepared)


class RwkvStreamForCausalLM(Part, PreTrainedModel, GenerationMixin):
    """An RWKV model behind transformers' interface."""

    config_class = RwkvStreamConfig
    main_input_name = "input_ids"
    _is_stateful = True  # so that `generate` refuses to guess tokens that it may have to take back

    def __init__(self, config: PretrainedConfig, rwkv: Model, tensors: Mapping[str, Tensor]) -> None:
        """tensors  of which `rwkv` was made, by canonical names"""
        self.prepared = Prepared()
        PreTrainedModel.__init__(self, config)
        self.post_init()  # type: ignore[operator]  # before there are weights, which it would draw
        self._bare = replace(rwkv, outer={}, stages=[Stage(stage.device, ()) for stage in rwkv.stages])
        self._names, self._are_copies = list(tensors), False
        for name, tensor in tensors.items():
            self.add(name, torch.nn.Parameter(tensor))
        self._matrices = {name: module for name, module in self.named_modules() if isinstance(module, torch.nn.Linear)}
        self.prepared.model = rwkv

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
        config.tie_word_embeddings, config.group_norm_eps = False, dims.group_norm_eps
        model = cls(config, rwkv, tensors_of(rwkv))
        model.eval()
        if (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model

    @property
    def rwkv(self) -> Model:
        """The model that reads in evaluation. Raises UsageError where other modules stand around its own."""
        if self.prepared.model is None:
            if self._is_wrapped:
                raise UsageError(
                    "computing with a model's own kernels: expected its own modules, found others around them; "
                    "merge and unload them"
                )
            self.prepared.model = with_tensors(self._bare, {name: self.get_parameter(name) for name in self._names})
        return self.prepared.model

    @property
    def _is_wrapped(self) -> bool:
        return any(self.get_submodule(name) is not module for name, module in self._matrices.items())

    @property
    def device(self) -> torch.device:
        return self._bare.device

    @property
    def dtype(self) -> torch.dtype:
        """That of products."""
        return self._bare.dtype

    def train(self, mode: bool = True) -> RwkvStreamForCausalLM:
        """Train, or evaluate: see the module."""
        if mode:
            self._copy_parameters()
            self.prepared.model = None
        super().train(mode)
        return self

    def _copy_parameters(self) -> None:
        """Make parameters that are mapped from a file copies, on the device and in the dtype of products."""
        if self._are_copies:
            return
        of_checkpoint = {id(self._tensor(name)): name for name in self._names}
        for parameter in self.parameters():
            dtype, name = parameter.dtype, of_checkpoint.get(id(parameter))
            if name is not None:
                dtype = self.dtype if name.endswith(TABLES) else dtype_in_memory(name, parameter, self.dtype)
            parameter.data = parameter.data.to(self.device, dtype, copy=True)
        self._are_copies = True

    def _tensor(self, name: str) -> Tensor:
        """A parameter by its name in checkpoints, whatever stands around its module."""
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.get_submodule(path), leaf)
        return tensor

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As `torch.nn.Module` does."""
        self._copy_parameters()
        self.prepared.model = None
        return super().load_state_dict(*args, **options)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.get_submodule("emb")

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.get_submodule("head")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: StateCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens [B, T]: logits fp32 [B, T, V], where there is padding 0, and the state as cache.

        attention_mask  [B, T], or with columns of earlier calls before them: 1 for tokens, 0 for padding, which is not
                        read; a row's tokens are together, with padding on either side
        cache           what was read before, of B rows or of one that all go on from; also as past_key_values
        logits_to_keep  0: all positions; n: the last n, [B, n, V]
        labels          [B, T] as transformers has them: -100 does not count; `loss` is the sum of the others in nats
                        over num_items_in_batch (default: how many they are). Then a cache comes back if it is asked for
        output_hidden_states
                        also what each layer reads, and what the head reads: n_layer + 1 tensors fp32 [B, T, C], where
                        there is padding meaningless; computed as in training
        raises          UsageError for inputs that make no sense, and for what is not there (attentions, embeddings as
                        input, position ids of one's own)
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
        if not isinstance(cache, StateCache | None):
            raise UsageError(f"reading tokens: expected {CACHE} as StateCache, found {type(cache).__name__}")
        settings: PretrainedConfig = self.config
        with_hidden = settings.output_hidden_states if output_hidden_states is None else output_hidden_states
        is_prepared = not (self.training or with_hidden or (self.prepared.model is None and self._is_wrapped))
        read = self._read_prepared if is_prepared else self._read_by_modules
        state = None if cache is None else cache.state.repeat(B) if cache.state.batch == 1 else cache.state
        hidden, state, real = self._read(read, input_ids, attention_mask, state)
        last = hidden[-1] if logits_to_keep == 0 else hidden[-1][:, -logits_to_keep:]
        logits = self.rwkv.head(last) if is_prepared else network.linear(last, self.get_output_embeddings())
        if real is not None:
            logits = logits * real[:, -logits.shape[1] :, None].to(logits.device)
        loss = None
        if labels is not None:
            predicted, targets = logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
            targets = targets.to(predicted.device)
            total = F.cross_entropy(predicted, targets, ignore_index=-100, reduction="sum")
            count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = total / torch.as_tensor(count, device=total.device)
        is_kept = use_cache or (use_cache is None and labels is None)
        kept = StateCache(state, (0 if cache is None else cache.n_tokens) + T) if is_kept else None
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=tuple(hidden) if with_hidden else None, **{CACHE: kept}
        )
        return output.to_tuple() if return_dict is False else output

    def _read(
        self, read: Reading, tokens: Tensor, mask: Tensor | None, state: State | None
    ) -> tuple[list[Tensor], State, Tensor | None]:
        """What `read` gives, [B, T, C] each, the last for the head; the new state; which are tokens, if not all are."""
        B, T = tokens.shape
        real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask[:, -T:].bool().cpu()
        if real.shape != (B, T):
            raise UsageError(f"reading tokens: expected attention_mask [{B}, {T}] or longer, found {list(real.shape)}")
        if real.all():
            return *read(tokens, state, None), None
        lengths = real.sum(1)
        first = real.int().argmax(1)
        order = first[:, None] + torch.arange(T)  # where each row's tokens stand, then whatever follows
        if not real.gather(1, order.clamp(max=T - 1))[torch.arange(T) < lengths[:, None]].all():
            raise UsageError(
                "reading tokens: expected the tokens of each row together, found padding between them; "
                "put it before or behind"
            )
        hidden, state = read(tokens.cpu().gather(1, order % T), state, lengths)
        place = ((torch.arange(T) - first[:, None]) % T).to(hidden[-1].device)
        return [z[torch.arange(B)[:, None], place] for z in hidden], state, real

    def _read_prepared(self, tokens: Tensor, state: State | None, lengths: Tensor | None) -> tuple[list[Tensor], State]:
        hidden, state = self.rwkv.forward(tokens, state, logits="none", lengths=lengths)
        return [hidden], state

    def _read_by_modules(
        self, tokens: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[list[Tensor], State]:
        """What each layer and the head read, and the new state, with gradients."""
        self._copy_parameters()
        config, parameters = self._bare.config, {name: self._tensor(name) for name in self._names}
        self._bare.check(tokens, state, "none", lengths)
        if state is None:
            state = initial_of(config, parameters).to(self.device).repeat(len(tokens))
        tokens, lengths = tokens.to(self.device), None if lengths is None else lengths.to(self.device)
        outer = {name.removeprefix("blocks.0."): z for name, z in parameters.items()}
        embedded = network.layer_norm(self.get_input_embeddings()(tokens).float(), outer, "ln0")
        stream, hidden, new = network.Stream(embedded, embedded), list[Tensor](), list[State]()
        matrices = {f"{name}.weight": self.get_submodule(name) for name in self._matrices}
        architecture = architectures.of(config.version)
        for i in range(config.n_layer):
            prefix = f"blocks.{i}."
            of_layer = {
                n.removeprefix(prefix): matrices.get(n, z) for n, z in parameters.items() if n.startswith(prefix)
            }
            block = architecture.prepare(of_layer, config)
            rows = network.Rows(tokens, State({name: z[:, i : i + 1] for name, z in state.items()}), lengths)
            hidden.append(stream.x)
            stream, after = network.layers(architecture, config, [block], stream, rows, self._bare.wkv)
            new.append(after)
        joined = State({name: torch.cat([after[name] for after in new], dim=1) for name in state})
        return [*hidden, network.layer_norm(stream.x, outer, "ln_out")], joined

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Whether `generate` may begin with a cache of keys and values."""
        return False

    def _reorder_cache(self, cache: StateCache, beam_idx: Tensor) -> StateCache:
        return cache.rows(beam_idx)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Write a folder that `from_pretrained` and the other programs of this package load, as transformers does.

        With the parameters as they are, by official names, and the tokenizer.json that the model came with.
        """
        super().save_pretrained(save_directory, *args, **options)
        given, beside = self._bare.loading.tokenizer, self._bare.folder / "tokenizer.json"
        source, target = beside if given is None else Path(given), Path(save_directory) / "tokenizer.json"
        if source.suffix == ".json" and source.is_file() and source.absolute() != target.absolute():
            shutil.copyfile(source, target)

    def _apply(self, function: Any, recurse: bool = True) -> RwkvStreamForCausalLM:
        """Where it computes and in which dtype is settled when it is loaded, so only what changes neither is done."""
        asked = function(torch.empty(0, dtype=self.dtype, device=self.device))
        if (asked.dtype, asked.device) != (self.dtype, self.device):
            raise UsageError(
                f"moving a model: expected {self.dtype} on {self.device}, where it was loaded, found {asked.dtype} on "
                f"{asked.device}; pass device= and dtype= to from_pretrained"
            )
        return self


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
