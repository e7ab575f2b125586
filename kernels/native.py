"""The library of C++ kernels (`csrc/`): found beside this module and loaded on first use.

It is linked to no OpenMP runtime and binds the one that torch has loaded, so that a process holds one runtime and one
pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch  # noqa: F401 -- brings its OpenMP runtime

from rwkv_stream.errors import BackendError

if TYPE_CHECKING:
    from importlib.abc import Traversable

T = TypeVar("T")

ABI_VERSION = 8
LIBRARY = "librwkv_stream_cpu.so"

_OPENMP = re.compile(r"(/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*)$", re.MULTILINE)


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process. Raises BackendError where they cannot be listed."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise BackendError(f"cannot look for torch's OpenMP runtime: {error}; use --backend reference") from error
    return sorted(set(_OPENMP.findall(maps)))


def where() -> Traversable:
    """Where the library is, if it was built."""
    return importlib.resources.files("rwkv_stream.kernels") / LIBRARY


def once(make: Callable[[], T]) -> Callable[[], T]:
    """A function that calls `make` the first time, also where several threads ask at once, and keeps what it gave."""
    lock, cached = threading.Lock(), functools.cache(make)

    @functools.wraps(make)
    def made() -> T:
        with lock:
            return cached()

    return made


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises BackendError with the reason where it is missing, broken or another version."""
    path = where()
    if not path.is_file():
        raise BackendError(
            f"cannot load the C++ kernels: expected '{path}', found no such file; "
            "install with a C++ compiler at hand (RWKV_STREAM_NATIVE=1 shows why one fails) or use --backend reference"
        )
    runtimes = openmp_runtimes()
    if len(runtimes) != 1:
        raise BackendError(
            "cannot load the C++ kernels: expected one OpenMP runtime in the process (torch's), "
            f"found {', '.join(runtimes) or 'none'}; use --backend reference"
        )
    try:
        ctypes.CDLL(runtimes[0], mode=ctypes.RTLD_GLOBAL)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"cannot load the C++ kernels from '{path}': {error}; use --backend reference") from error
    found = loaded.abi_version()
    if found != ABI_VERSION:
        raise BackendError(
            f"cannot use the C++ kernels in '{path}': expected interface {ABI_VERSION}, found {found}; install again"
        )
    size, pointer, integer = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    loaded.wkv7_scratch.argtypes, loaded.wkv7_scratch.restype = [size, integer], size
    loaded.wkv7_kept.argtypes, loaded.wkv7_kept.restype = [size], size
    loaded.wkv7_forward.argtypes = [size, pointer, size, size, integer, *[pointer] * 15]
    loaded.wkv7_forward.restype = None
    loaded.wkv6_forward.argtypes = [size, pointer, size, size, integer, *[pointer] * 12]
    loaded.wkv4_forward.argtypes = [size, pointer, size, integer, *[pointer] * 9]
    loaded.wkv6_forward.restype = loaded.wkv4_forward.restype = None
    loaded.wkv7_backward.argtypes, loaded.wkv7_backward.restype = [size] * 4 + [integer] + [pointer] * 18, None
    loaded.instruction_set.argtypes, loaded.instruction_set.restype = [integer], integer
    loaded.linear_scratch.argtypes, loaded.linear_scratch.restype = [size], size
    loaded.linear.argtypes = [size, size, size, integer, integer, pointer, size, pointer, pointer, integer]
    loaded.linear.argtypes += [pointer, size, integer, integer, integer, pointer]
    loaded.norm_shift_mix.argtypes = [
        size,
        *[pointer] * 3,
        size,
        size,
        ctypes.c_float,
        *[pointer] * 6,
        size,
        pointer,
        integer,
        pointer,
    ]
    loaded.norm_shift_mix.argtypes += [size, integer, pointer]
    loaded.time_mix_scratch.argtypes, loaded.time_mix_scratch.restype = [size], size
    loaded.time_mix.argtypes = [size, *[pointer] * 3, size, size, pointer, pointer, size, pointer, size, pointer]
    loaded.time_mix.argtypes += [integer, integer, pointer]
    loaded.rwkv7_layers.argtypes = [size, *[pointer] * 3, size, size, size, *[ctypes.c_float] * 2, *[pointer] * 13]
    loaded.rwkv7_layers.argtypes += [integer, integer, integer, pointer]
    loaded.rwkv7_layers.restype = None
    loaded.linear.restype = loaded.norm_shift_mix.restype = loaded.time_mix.restype = None
    loaded.time_mix_training_scratch.argtypes, loaded.time_mix_training_scratch.restype = [size], size
    loaded.time_mix_kept.argtypes, loaded.time_mix_kept.restype = [size, size], size
    loaded.time_mix_forward.argtypes = [size, pointer, size, size, pointer, integer, *[pointer] * 6, integer, pointer]
    loaded.time_mix_backward.argtypes = [size, pointer, size, size, pointer, integer, *[pointer] * 8, integer, pointer]
    loaded.norm_shift_mix_backward.argtypes = [size, pointer, pointer, size, size, integer, ctypes.c_float]
    loaded.norm_shift_mix_backward.argtypes += [*[pointer] * 9, integer, pointer]
    loaded.relu2.argtypes = [size, integer, *[pointer] * 3, integer]
    loaded.softmax_gradient.argtypes = [size, size, integer, pointer, ctypes.c_float, *[pointer] * 2, integer, pointer]
    loaded.time_mix_forward.restype = loaded.time_mix_backward.restype = loaded.norm_shift_mix_backward.restype = None
    loaded.relu2.restype = loaded.softmax_gradient.restype = None
    return loaded
