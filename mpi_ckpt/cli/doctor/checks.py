# SPDX-License-Identifier: Apache-2.0
"""What a check of this machine found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        area: What it is about: ``software``, ``MPI``, ``launcher`` or ``directory``.
        name: What was looked at.
        found: What is there.
        verdict: ``ok``, ``note`` (works, with something to know) or ``wrong``.
        advice: What that means, or what to do.
    """

    area: str
    name: str
    found: str
    verdict: Literal["ok", "note", "wrong"] = "ok"
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the check as JSON values."""
        return asdict(self)
