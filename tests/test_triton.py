"""The Triton kernels without a GPU: under the interpreter (`tests/interpreted`, in a process of its own), and compiled
for the GPUs that there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_stream import kernels
from rwkv_stream.errors import BackendError

HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
TILE = {"N": 64, "T": 32, "P": 64}


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-q", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parent, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    assert "skipped" not in run.stdout.splitlines()[-1] or "passed" in run.stdout.splitlines()[-1]


def kinds() -> dict[str, dict[str, object]]:
    """Kernel → what its constants are; every other argument that is a pointer or an integer is told by its name."""
    import triton.language as tl

    dots = TILE | {"KIND": tl.bfloat16, "PRECISION": "ieee"}
    return {
        "wkv7_blocks": dots | {"LEVELS": 5},
        "wkv7_pass": dots | {"V": 32},
        "wkv7_outputs": dots,
        "wkv6_pass": dots | {"V": 32, "T": 64},
        "wkv6_outputs": dots | {"G": 16, "T": 64},
        "wkv4_blocks": {"V": 128},
        "wkv4_pass": {"V": 128},
        "wkv4_outputs": {"V": 128},
    }


FP32 = {"w", "state", "starts", "final", "sums"}
INT32 = {"first", "length", "begin", "count"}
WITHOUT_PRODUCTS = {"wkv4_blocks", "wkv4_pass", "wkv4_outputs"}


def signature_of(name: str, constants: dict[str, object]) -> dict[str, str]:
    from rwkv_stream.kernels import wkv_triton

    types = {}
    for argument in getattr(wkv_triton, name).arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in ("H", "C"):
            types[argument] = "i32"
        elif argument == "start":
            types[argument] = "*i64"
        else:
            types[argument] = "*fp32" if argument in FP32 else "*i32" if argument in INT32 else "*bf16"
    return types


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "name",
    [f"wkv7_{k}" for k in ("blocks", "pass", "outputs")] + ["wkv6_pass", "wkv6_outputs"] + sorted(WITHOUT_PRODUCTS),
)
def test_kernels_compile_for_gpus_that_are_not_here(name: str, capability: int) -> None:
    """To machine code, in registers alone, and with products on tensor cores."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (extra `gpu`)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rwkv_stream.kernels import wkv_triton

    constants = kinds()[name]
    source = ASTSource(fn=getattr(wkv_triton, name), signature=signature_of(name, constants), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    ptx = compiled.asm["ptx"]
    on_tensor_cores = any(f" {kind}" in ptx or f"\t{kind}" in ptx for kind in ("mma.", "wgmma.", "tcgen05."))
    assert on_tensor_cores == (name not in WITHOUT_PRODUCTS)
    assert compiled.metadata.shared <= 99 * 1024
    assert len(compiled.asm["cubin"]) > 0
    print(f"{name} sm_{capability}: shared {compiled.metadata.shared} bytes")


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
