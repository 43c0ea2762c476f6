"""The native CPU backend: what plain torch does in many passes over memory, in one pass of C++."""

from dpfa_kernels_cpu.backend import CpuBackend

__version__ = "0.1.0"
__all__ = ["CpuBackend"]
