# SPDX-License-Identifier: Apache-2.0
"""Defines what the ranks have agreed to do at the end of a step. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class StepActions:
    """What to do at the end of a step, the same on every rank.

    Attributes:
        stop: Save, then stop.
        save: A save is due.
        finish: All ranks have written a pending save; it can be acknowledged.
        remember: A copy in memory is due, and no save is being written from the previous
            one.
        local: A save to the hosts is due, and no save is pending once ``finish`` was done.
        copy: All hosts have copied a generation to the directory, or should try again.
        last: Where the last save goes before a stop: to the hosts if it fits nowhere else.
    """

    stop: bool
    save: bool
    finish: bool
    remember: bool
    local: bool
    copy: bool
    last: Literal["directory", "local"] = "directory"
