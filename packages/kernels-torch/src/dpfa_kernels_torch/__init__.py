"""The backend in plain torch: the truth that faster backends are compared with, on any device."""

from dpfa_kernels_torch.backend import TorchBackend
from dpfa_kernels_torch.noise.keys import KeySource

__version__ = "0.1.0"
__all__ = ["KeySource", "TorchBackend"]
