# SPDX-License-Identifier: Apache-2.0
"""All that torch and NumPy have comes back as it was, or is refused by name."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip(
    "tests.conformance.torch_db",
    reason="torch's own lists of optimizers and modules need the package expecttest",
    exc_type=ImportError,
)

from tests.conformance import table
from tests.conformance.scheduler_cases import CONFIGURATIONS, public_schedulers


@pytest.fixture(scope="module")
def verdicts():
    return table.verdicts()


def test_whatever_does_not_come_back_is_refused_with_its_name(verdicts):
    refused = {case: words for case, words in verdicts.items() if words is not None}
    assert [str(c) for c, words in refused.items() if not re.search(r"\bx\b", words)] == []


def test_every_class_of_torch_comes_back(verdicts):
    by_class = [case for case in verdicts if not case.group.startswith("Elements")]
    assert [str(case) for case in by_class if verdicts[case] is not None] == []
    tried = {case.what for case in by_class}
    optimizers = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    assert optimizers - {"Optimizer"} <= tried
    assert public_schedulers() == set(CONFIGURATIONS)


def test_page_says_what_was_found(verdicts):
    written = table.PAGE.read_text()
    if table.VERSIONS not in written:
        pytest.skip(f"the page was made with other versions than {table.VERSIONS}")
    assert table.page(verdicts) == written, f"run `{table.COMMAND}`"
