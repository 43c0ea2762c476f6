"""The file of a private memory: safetensors, its terms in the header."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from dpfa_core.checks import require
from dpfa_core.errors import PrivacyParameterError

FORMAT = 1


def safetensors(module: str = "safetensors") -> Any:
    """The optional package that memories are written with, or a module of it.

    Raises: PrivacyParameterError where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PrivacyParameterError(
            f"saving and loading a memory needs the package safetensors, got none that can be imported ({error}); "
            "pip install 'dpfa-attention[files]'."
        ) from error


def write_memory(path: Path, tensors: dict[str, Tensor], terms: dict[str, Any]) -> None:
    """Write atomically, durably, readable by the owner only: a crash leaves the file before."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors("safetensors.torch").save(
        whole, metadata={"format": "pt", "private_memory": json.dumps({"version": FORMAT} | terms)}
    )
    draft = path.with_name(path.name + ".part")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        draft.chmod(0o600)  # of a draft that was there before
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_memory(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, terms) as they were written.

    Raises: PrivacyParameterError for a file that is not a memory of this version.
    """
    package = safetensors()
    require(path.is_file(), "a memory is a file that PrivateMemory.save wrote", str(path))
    try:
        with package.safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("private_memory", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    except package.SafetensorError as error:
        require(False, f"{path} must be a file that PrivateMemory.save wrote", str(error))
    terms: dict[str, Any] = json.loads(found)
    require(
        terms.pop("version", None) == FORMAT and set(tensors) == {"keys", "values"},
        f"{path} must be a memory of format {FORMAT}",
        sorted(tensors),
    )
    return tensors, terms
