"""The compiled library: found in a folder of this package, loaded once, plain C functions, run without the GIL."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import dpfa_kernels_cpu
from dpfa_core.errors import PluginError

LEVELS = ("portable", "AVX2", "AVX-512")
"""Instruction sets, by the number that the library gives them."""

_NAMES = ("dpfa_native.so", "dpfa_native.dylib", "dpfa_native.dll")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Raises: PluginError where it was not built or cannot be loaded."""
    folders = [Path(folder) / "native" for folder in dpfa_kernels_cpu.__path__]
    found = [folder / name for folder in folders for name in _NAMES if (folder / name).is_file()]
    if not found:
        raise PluginError(
            "dpfa-kernels-cpu must have its compiled library beside it, got none; install the package with a C++17 "
            "compiler at hand, or use the torch backend."
        )
    try:
        native = ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise PluginError(f"the library of dpfa-kernels-cpu cannot be loaded: {error}") from error
    native.dpfa_best_level.restype = ctypes.c_int
    for name in ("dpfa_add_noise_f32", "dpfa_add_noise_f64"):
        function = getattr(native, name)
        function.restype = ctypes.c_int
        function.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
            ctypes.c_double,
            ctypes.c_char_p,
            ctypes.c_uint32,
            ctypes.POINTER(ctypes.c_uint32),
        )
    return native


@lru_cache(maxsize=1)
def best_level() -> int:
    """The highest instruction set of this processor that the library was built for; a number into ``LEVELS``."""
    return int(library().dpfa_best_level())
