"""Which records belong to which user, where the protected unit is a user."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

from dpfa_core.checks import require
from dpfa_core.errors import PrivacyParameterError


class Users:
    """Records grouped by their user; users are numbered in order of first appearance.

    Args:
        user_ids: one hashable id for each record of the dataset, in its order; a tensor or list.
        records: length of the dataset.

    Raises: PrivacyParameterError.
    """

    def __init__(self, user_ids: Sequence[Hashable] | Any, records: int) -> None:
        ids = user_ids.tolist() if hasattr(user_ids, "tolist") else list(user_ids)
        require(
            len(ids) == records,
            f"user_ids must name the user of each of the {records} records",
            f"{len(ids)} ids",
            "Give one id for each record, in the order of the dataset.",
        )
        groups: dict[Hashable, list[int]] = {}
        try:
            for record, user in enumerate(ids):
                groups.setdefault(user, []).append(record)
        except TypeError as error:
            raise PrivacyParameterError(f"user_ids must be hashable, got {error}; use numbers or strings.") from error
        require(
            all(user == user for user in groups),  # NaN would make a user of every record
            "user_ids must equal themselves",
            "NaN",
            "Name the users of all records.",
        )
        self.records = tuple(tuple(group) for group in groups.values())
        self.largest = max(map(len, self.records))

    def __len__(self) -> int:
        return len(self.records)

    def digest(self) -> str:
        """SHA-256 of the grouping."""
        return hashlib.sha256(repr(self.records).encode()).hexdigest()
