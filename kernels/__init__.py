"""How the recurrence is computed: which backends there are, which of them works here, and which one serves.

Importing this package loads no library and registers no op; the first use does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from rwkv_stream.errors import BackendError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Wkv = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    WkvPacked = Callable[..., tuple[Tensor, Tensor]]

BACKENDS = ("cpu", "reference")

_log = logging.getLogger(__name__)


def available() -> dict[str, str | None]:
    """Backend → None where it can be used on this machine, else the reason why not."""
    return {name: _problem(name) for name in BACKENDS}


def abi_version() -> int:
    """The interface of the native kernels, which is part of what decides the last bits of a state."""
    from rwkv_stream.kernels import wkv_cpu

    version: int = wkv_cpu.ABI_VERSION
    return version


def resolve(version: int, backend: str, device: torch.device | str, head_size: int) -> tuple[str, Wkv]:
    """The name and the function of the backend that computes the recurrence of an RWKV `version` on `device`.

    `backend` is "auto" or one of BACKENDS. "auto" takes the fastest that works and says once if that is not the
    native one; a named backend is used or BackendError says why it cannot be.
    """
    import torch

    kind = torch.device(device).type
    if version != 7:
        raise BackendError(f"no kernel for RWKV version {version}: expected 7; use another checkpoint")
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"unknown backend '{backend}': expected one of {', '.join(('auto', *BACKENDS))}")
    if backend == "cpu" and kind != "cpu":
        raise BackendError(f"backend 'cpu' computes on the cpu, found device '{device}'; use --backend reference")
    if backend == "reference" or kind != "cpu":
        return "reference", _reference
    problem = _problem("cpu")
    if problem is None:
        from rwkv_stream.kernels import wkv_cpu

        return "cpu", wkv_cpu.wkv7
    if backend == "cpu":
        raise BackendError(problem)
    _say_fallback(problem)
    return "reference", _reference


def packed(backend: str, wkv: Wkv) -> WkvPacked:
    """The recurrence over segments of any lengths laid end to end, as `backend`, resolved before to `wkv`, computes it.

    It is called with r w k v a b [n, H, N], offsets int64 [S + 1] (segment s is tokens offsets[s] to offsets[s + 1],
    one at least), state [R, H, N, N], start int64 [S] (the row of `state` that each segment starts from) and keep
    int64 [K] (the segments whose state comes back); returns y [n, H, N] and new state [K, H, N, N]. No gradients.
    """
    if backend == "cpu":
        from rwkv_stream.kernels import wkv_cpu

        native: WkvPacked = wkv_cpu.wkv7_packed
        return native
    from rwkv_stream.kernels import wkv_ref

    return functools.partial(wkv_ref.wkv7_packed, wkv)


def _reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain torch: the matrix form, or for a single token the recurrence itself."""
    from rwkv_stream.kernels import wkv_ref

    form: Wkv = wkv_ref.wkv7_recurrent if r.shape[1] == 1 else wkv_ref.wkv7_chunked
    return form(r, w, k, v, a, b, state)


def _problem(name: str) -> str | None:
    if name == "reference":
        return None
    from rwkv_stream.kernels import wkv_cpu

    try:
        wkv_cpu.library()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def _say_fallback(problem: str) -> None:
    _log.warning("using the plain torch kernels: %s", problem)
