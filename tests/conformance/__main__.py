# SPDX-License-Identifier: Apache-2.0
"""Writes docs/conformance.md: ``python -m tests.conformance``."""

from tests.conformance.table import PAGE, page, verdicts

PAGE.write_text(page(verdicts()))
