"""Which loaders may be wrapped: their sampling is replaced, so it must not be one that somebody chose."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from dpfa_core.checks import require
from dpfa_core.errors import NotPrivateError
from dpfa_training.sampling.loader import PrivateLoader


def check_loader(
    loader: DataLoader[Any], *, batch_of: str = "training records", units: int | None = None
) -> tuple[int, int]:
    """(records, batch size) of a loader whose sampling may be replaced.

    Args: `units` that a batch counts, if they are not the records, and what they are called.
    Raises: PrivacyParameterError, or NotPrivateError for a sampler of the user's own, which is not silently replaced.
    """
    kind = "what make_private gave back" if isinstance(loader, PrivateLoader) else type(loader).__name__
    require(
        isinstance(loader, DataLoader), "the loader must be a torch DataLoader", kind, "Pass the one it is made of."
    )
    dataset = loader.dataset
    if not isinstance(dataset, Sized) or isinstance(dataset, torch.utils.data.IterableDataset):
        raise NotPrivateError(
            f"private sampling needs a dataset with a length and an index, got {type(dataset).__name__}; "
            "use a map-style dataset."
        )
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler) and (type(loader.batch_sampler) is BatchSampler)
    replacement = getattr(loader.sampler, "replacement", False)
    subset = getattr(loader.sampler, "_num_samples", None) is not None
    if not plain or replacement or subset or loader.batch_size is None:
        raise NotPrivateError(
            f"the loader must use torch's own sequential or shuffled sampling of the whole dataset, got "
            f"{type(loader.batch_sampler or loader.sampler).__name__} over {type(loader.sampler).__name__}; "
            "it would be replaced by private sampling, so build the DataLoader with batch_size=... only."
        )
    size = loader.batch_size or 0
    population = len(dataset) if units is None else units
    require(
        1 <= size <= population,
        f"batch_size must be between 1 and the {population} {batch_of}",
        size,
        "Choose a smaller batch size.",
    )
    return len(dataset), size
