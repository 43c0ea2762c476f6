"""Which CUDA this installation of torch can use."""

from __future__ import annotations


def cuda_version() -> str | None:
    """The CUDA version torch was built for, e.g. "12.8", where a device can be used; otherwise None.

    Never raises.
    """
    try:
        import torch

        return torch.version.cuda if torch.cuda.is_available() else None
    except Exception:
        return None
