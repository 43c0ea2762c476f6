"""The main job's ViT on real digits."""

from __future__ import annotations

from torch import Tensor

from dpfa_benchmarks.workloads.workload import Model, Workload, fresh


def _build(batch: int, toy: bool) -> Workload:
    """Raises: ValueError for a batch that the digits cannot fill."""
    from dp_flash_attention.data.digits import digits
    from dp_flash_attention.models.vit import VisionTransformer

    task = digits()
    images = task.train.inputs
    if not isinstance(images, Tensor) or not 1 <= batch <= len(images):
        raise ValueError(f"batch must be between 1 and the {len(images)} training digits, got {batch}.")
    return Workload(fresh(lambda: VisionTransformer(classes=10)), images[:batch], task.train.labels[:batch])


VIT = Model(batch=500, build=_build)
