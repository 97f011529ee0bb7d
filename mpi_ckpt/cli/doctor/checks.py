# SPDX-License-Identifier: Apache-2.0
"""Defines the result of a check of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        area: Its subject: ``software``, ``MPI``, ``launcher`` or ``directory``.
        name: What was checked.
        found: What was found.
        verdict: ``ok``, ``note`` (works, with a remark) or ``wrong``.
        advice: What it means, or what to do.
    """

    area: str
    name: str
    found: str
    verdict: Literal["ok", "note", "wrong"] = "ok"
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the check as JSON values."""
        return asdict(self)
