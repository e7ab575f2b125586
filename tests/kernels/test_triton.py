"""The Triton kernels without a GPU: under the interpreter (`tests/interpreted`, in a process of its own), and compiled
for the GPUs that there are."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from rwkv_stream import kernels
from rwkv_stream.errors import BackendError

HERE = Path(__file__).parents[1]
CAPABILITIES = (80, 90, 100)
TILE = {"N": 64, "T": 32, "P": 64}
WARPS = {"wkv7_back_outputs": 8}


@pytest.mark.parametrize("part", sorted(path.stem for path in (HERE / "interpreted").glob("test_*.py")))
def test_under_the_interpreter(part: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "interpreted" / f"{part}.py"), "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert "skipped" not in run.stdout.splitlines()[-1] or "passed" in run.stdout.splitlines()[-1]


class Kernel(NamedTuple):
    """A kernel as it is launched: its constants, and the dtypes of what is neither bf16 nor told by its name."""

    module: str
    constants: dict[str, object]
    warps: int = 4
    has_products: bool = True


def kernels_to_compile() -> dict[str, Kernel]:
    """Name, and of what size if there are several → kernel."""
    import triton.language as tl

    dots = TILE | {"KIND": tl.bfloat16, "PRECISION": "ieee"}
    of_wkv = {
        "wkv7_blocks": dots | {"LEVELS": 5, "KEEP": True},
        "wkv7_pass": dots | {"V": 32},
        "wkv7_outputs": dots,
        "wkv7_back_blocks": dots,
        "wkv7_back_pass": dots | {"V": 32},
        "wkv7_back_outputs": dots,
        "wkv6_pass": dots | {"V": 32, "T": 64},
        "wkv6_outputs": dots | {"G": 16, "T": 64},
        "wkv4_blocks": {"V": 128},
        "wkv4_pass": {"V": 128},
        "wkv4_outputs": {"V": 128},
    }
    found = {
        name: Kernel("recurrence.triton", constants, WARPS.get(name, 4), has_products="KIND" in constants)
        for name, constants in of_wkv.items()
    }
    tile = {"N": 64, "T": 16, "P": 64}
    of_rwkv7 = {
        "norm_shift_mix_rows of 4096": ({"M": 6, "P": 4096}, 16),
        "norm_shift_mix_rows of 8192": ({"M": 6, "P": 8192}, 16),
        "relu2_elements": ({"BLOCK": 2048}, 4),
        "time_mix_inputs": (tile | {"MIXED": True}, 4),
        "time_mix_inputs of the first layer": (tile | {"MIXED": False}, 4),
        "time_mix_outputs": (tile, 4),
        "time_mix_step": ({"N": 64, "P": 64, "V": 64, "TILES": 1, "MIXED": True}, 4),
        "time_mix_step of 256": ({"N": 256, "P": 256, "V": 16, "TILES": 16, "MIXED": True}, 4),
    }
    for name, (constants, warps) in of_rwkv7.items():
        found[name] = Kernel("layers.triton", constants, warps, has_products=False)
    drawn = {"GREEDY": False, "TOP_P": True, "TOP_K": True, "COUNTS": True, "V": 65_536, "TILE": 4096, "P": 16}
    of_sampling = {
        "penalise": ({"V": 65_536, "TILE": 1024}, 4),
        "choose": (drawn, 8),
        "choose of 50277": (drawn | {"V": 50_277}, 8),
        "choose of top_p alone": (drawn | {"TOP_K": False, "COUNTS": False}, 8),
        "choose of greedy rows": (drawn | {"GREEDY": True}, 8),
    }
    for name, (constants, warps) in of_sampling.items():
        found[name] = Kernel("sampling.triton", constants, warps, has_products=False)
    return found


NAMES = (
    *("wkv7_blocks", "wkv7_pass", "wkv7_outputs", "wkv6_pass", "wkv6_outputs"),
    *("wkv7_back_blocks", "wkv7_back_pass", "wkv7_back_outputs"),
    *("wkv4_blocks", "wkv4_pass", "wkv4_outputs"),
    *("norm_shift_mix_rows of 4096", "norm_shift_mix_rows of 8192", "relu2_elements"),
    *("time_mix_inputs", "time_mix_inputs of the first layer", "time_mix_outputs"),
    *("time_mix_step", "time_mix_step of 256"),
    *("penalise", "choose", "choose of 50277", "choose of top_p alone", "choose of greedy rows"),
)
SPILLED = 64  # bytes a thread at most: Triton 3.6 spills 40 where later ones spill none
INT32 = {"first", "length", "begin", "count", "start", "to", "before", "after"}
FP32 = {
    "recurrence.triton": {"w", "state", "starts", "final", "sums", "dw", "d_final", "d_ends", "d_start"},
    "layers.triton": {
        *("x", "weight", "bias", "mix", "x_prev", "last", "log_decay", "state", "new_state"),
        *("w0", "a0", "v0", "k_k", "k_a", "r_k"),
    },
    "sampling.triton": {"logits", "counts", "out"},
}
OTHER = {"shares": "*fp64", "tokens": "*i64", "top_k": "i32"} | dict.fromkeys(
    ("eps", "scale", "top_p", "presence", "frequency", "decay"), "fp32"
)


def type_of(argument: str, name: str, kernel: Kernel) -> str:
    if argument in kernel.constants:
        return "constexpr"
    if argument in ("H", "C", "n") or argument.endswith("_stride") or (name, argument) == ("relu2_elements", "count"):
        return "i32"
    if argument in OTHER:
        return OTHER[argument]
    return "*i32" if argument in INT32 else "*fp32" if argument in FP32[kernel.module] else "*bf16"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_for_gpus_that_are_not_here(name: str, capability: int, tmp_path: Path) -> None:
    """To machine code, in registers but for a few bytes, and with products on tensor cores."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels_to_compile()[name]
    function = getattr(importlib.import_module(f"rwkv_stream.kernels.{kernel.module}"), name.split(" of ")[0])
    types = {argument: type_of(argument, name, kernel) for argument in function.arg_names}
    aligned = {  # as launches find them: tensors, widths and strides
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or argument in ("C", "count") or argument.endswith("_stride")
    }
    source = ASTSource(fn=function, signature=types, constexprs=kernel.constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": kernel.warps})
    ptx = compiled.asm["ptx"]
    on_tensor_cores = any(f" {kind}" in ptx or f"\t{kind}" in ptx for kind in ("mma.", "wgmma.", "tcgen05."))
    assert on_tensor_cores == kernel.has_products
    assert compiled.metadata.shared <= 99 * 1024
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    dumped = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dumped.stdout)}
    print(
        f"{name} sm_{capability}: {used['REG']} registers, {used['STACK'] + used['LOCAL']} bytes spilled, "
        f"{compiled.metadata.shared} bytes of shared memory"
    )
    assert used["STACK"] + used["LOCAL"] <= SPILLED, "registers were spilled"


def test_every_kernel_is_compiled() -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")
    modules = {module: importlib.import_module(f"rwkv_stream.kernels.{module}") for module in FP32}
    found = {
        name
        for module in modules.values()
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.jit.JITFunction) and not name.startswith("_")
    }
    assert {name.split(" of ")[0] for name in NAMES} == found
    assert set(NAMES) == set(kernels_to_compile())


def test_a_gpu_that_is_not_there_is_explained() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = kernels.available()["triton"]
    assert reason is not None and ("no GPU" in reason or "rwkv-stream[gpu]" in reason)
    with pytest.raises(BackendError, match="backend 'triton' computes on a GPU"):
        kernels.resolve("7", "triton", "cpu")
    with pytest.raises(BackendError, match=r"cannot use the GPU kernels"):
        kernels.resolve("7", "triton", "cuda")
