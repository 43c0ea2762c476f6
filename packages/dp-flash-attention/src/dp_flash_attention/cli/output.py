"""Where output goes: answers on stdout, everything else on stderr, JSON as one object."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from dp_flash_attention.numbers import strict

answers = Console()
errors = Console(stderr=True)


def print_json(value: dict[str, Any]) -> None:
    """One strict JSON object on stdout; infinities become strings."""
    sys.stdout.write(json.dumps(strict(value), allow_nan=False) + "\n")
