# SPDX-License-Identifier: Apache-2.0
"""The documents name what there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mpi_ckpt.options import ENVIRONMENT, Options

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


def test_every_option_and_variable_is_in_the_options_page():
    text = (REPOSITORY / "docs" / "options.md").read_text()
    names = [field.name for field in fields(Options)]
    assert [n for n in [*names, *ENVIRONMENT] if f"`{n}`" not in text] == []


def test_the_options_page_names_nothing_else():
    text = (REPOSITORY / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(rows) == {field.name for field in fields(Options)}
    assert set(re.findall(r"MPI_CKPT_\w+", text)) == set(ENVIRONMENT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [t for t in local if not (document.parent / t).exists()] == []


def test_the_first_pages_stay_short():
    lines = {
        p: len((REPOSITORY / p).read_text().splitlines())
        for p in ("README.md", "ARCHITECTURE.md")
    }
    assert lines["README.md"] <= 130
    assert lines["ARCHITECTURE.md"] <= 150
