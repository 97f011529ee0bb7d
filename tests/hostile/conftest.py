# SPDX-License-Identifier: Apache-2.0
"""Settings of the tests with bad inputs: one process, one rank, no mpirun."""

from __future__ import annotations

from tests.single.conftest import no_leaks, seeded

__all__ = ["no_leaks", "seeded"]
