"""The run folder: what a training leaves behind, each file written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from dp_flash_attention.numbers import strict
from dpfa_core.errors import PrivacyParameterError

WEIGHTS, PRIVACY, METRICS, REPORT = "model.safetensors", "privacy.json", "metrics.json", "report.html"
LEDGER, CHECKPOINT, RESUME = "ledger.db", "checkpoint.pt", "resume.json"


class RunFolder:
    """One folder for one run; created, or reopened to resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder; it must be empty or absent, so that no run overwrites another's ledger.

        Raises: PrivacyParameterError.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise PrivacyParameterError(
                f"--out must be a folder that can be written, got {str(path)!r}: {error.strerror}; "
                "choose another folder."
            ) from error
        if any(path.iterdir()):
            raise PrivacyParameterError(
                f"--out must be a new or empty folder, got {str(path)!r} with files in it; choose another "
                "one, or go on with --resume."
            )
        return cls(path)

    @classmethod
    def unfinished(cls, path: Path) -> RunFolder:
        """A folder in which a run was started and not ended.

        Raises: PrivacyParameterError.
        """
        if (path / PRIVACY).is_file():
            raise PrivacyParameterError(
                f"--resume needs a run that was interrupted, got {str(path)!r}, which is finished; its report is "
                f"{path / REPORT}."
            )
        if not (path / RESUME).is_file():
            raise PrivacyParameterError(
                f"--resume needs the folder of an interrupted run with its {RESUME}, got {str(path)!r}; "
                "check the path, or start a new run."
            )
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(strict(value), indent=2, allow_nan=False) + "\n"
        write_whole(self / name, text.encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Raises: PrivacyParameterError if the file is missing or damaged."""
        try:
            value = json.loads((self / name).read_text())
        except (OSError, ValueError) as error:
            raise PrivacyParameterError(
                f"expected the run folder {str(self.path)!r} to hold a readable {name}, got "
                f"{type(error).__name__}; finish the run with --resume."
            ) from error
        if not isinstance(value, dict):
            raise PrivacyParameterError(f"{name} must hold a JSON object, got {type(value).__name__}.")
        return value

    def write_weights(self, weights: dict[str, torch.Tensor], privacy: dict[str, Any]) -> str:
        """Save the weights with the privacy statement in their metadata; returns their SHA-256."""
        from safetensors.torch import save

        # Tensors that share memory are written once for each name.
        plain = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}
        metadata = {"format": "pt", "dp": json.dumps(strict(privacy), allow_nan=False)}
        data = save(plain, metadata=metadata)
        write_whole(self / WEIGHTS, data)
        return hashlib.sha256(data).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the target, then put it in place: a crash leaves the old file or the new one."""
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
