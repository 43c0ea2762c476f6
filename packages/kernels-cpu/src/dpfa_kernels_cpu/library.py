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

_LEVEL, _POINTER, _SIZE, _BLOCK = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
_STREAM = ctypes.POINTER(ctypes.c_uint32)
_NOISE = (_LEVEL, _POINTER, _SIZE, _SIZE, ctypes.c_double, ctypes.c_char_p, _BLOCK, _STREAM)
_RELEASE = (_LEVEL, ctypes.c_int, _POINTER, _POINTER)
_ARGUMENTS = {
    "dpfa_best_level": (),
    "dpfa_add_noise_f32": _NOISE,
    "dpfa_add_noise_f64": _NOISE,
    "dpfa_add_release_f32": _RELEASE,
    "dpfa_add_release_f64": _RELEASE,
    "dpfa_key_stream": (_LEVEL, _POINTER, ctypes.c_int64, ctypes.c_char_p, _BLOCK, _STREAM),
    "dpfa_bare_squares": (_LEVEL, _POINTER, _SIZE, _SIZE, _POINTER),
    "dpfa_embedding_squares": (_LEVEL, *[_POINTER] * 3, ctypes.c_int64, *[_SIZE] * 3, *[_POINTER] * 3),
}
"""Of every function, which all return an int. The sizes of the pointed-at memory are for the callers to keep."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Raises: PluginError where it was not built, cannot be loaded, or is of older sources."""
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
    for name, arguments in _ARGUMENTS.items():
        try:
            each = getattr(native, name)
        except AttributeError as error:
            raise PluginError(
                f"the library of dpfa-kernels-cpu must be built from the sources beside it, got one without {name}; "
                "install the package again."
            ) from error
        each.restype, each.argtypes = ctypes.c_int, arguments
    return native


def function(name: str) -> ctypes._CFuncPtr:
    """A function of the library, by its name in C. Raises: PluginError as ``library``."""
    return getattr(library(), name)


@lru_cache(maxsize=1)
def best_level() -> int:
    """The highest instruction set of this processor that the library was built for; a number into ``LEVELS``."""
    return int(library().dpfa_best_level())
