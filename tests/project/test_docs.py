# SPDX-License-Identifier: Apache-2.0
"""The documents name what there is."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpi_ckpt import PerRankState
from mpi_ckpt.options import ENVIRONMENT, IO, Options, StopWhen

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


def test_every_option_and_variable_is_in_the_options_page():
    text = (REPOSITORY / "docs" / "options.md").read_text()
    names = [field.name for field in fields(Options)]
    assert [n for n in [*names, *ENVIRONMENT] if f"`{n}`" not in text] == []


def test_the_options_page_names_nothing_else():
    text = (REPOSITORY / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    described = [*fields(Options), *fields(IO), *fields(StopWhen)]
    assert sorted(rows) == sorted(field.name for field in described)
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
    assert lines["ARCHITECTURE.md"] <= 175


def block_of(document, function):
    """Return the example in which a page defines a function."""
    text = (REPOSITORY / "docs" / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = (one for one in blocks if f"def {function}(" in one)
    return block


def test_example_of_sharing_out_runs():
    found = {"PerRankState": PerRankState}
    exec(block_of("elastic.md", "share_out"), found)
    assert found["share_out"]([[1, 2], [3]], 3) == [[1], [2], [3]]
    assert found["hard"].value == []


def test_example_of_rescaling_keeps_the_schedule():
    torch = pytest.importorskip("torch")

    def make(rate):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)

    optimizer, scheduler = make(0.25)
    expected, other = make(0.5)
    restoring = SimpleNamespace(restore=lambda on_resize: on_resize(2, 4))
    found = {"optimizer": optimizer, "scheduler": scheduler, "manager": restoring}
    exec(block_of("elastic.md", "rescale"), found)
    for _ in range(3):
        assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
        for one, schedule in ((optimizer, scheduler), (expected, other)):
            one.step()
            schedule.step()


AROUND_THE_README = """
import torch
from torch.utils.data import DataLoader

dataset, trained = range(512), []
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.Adam(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
train = trained.append
{example}
assert {{len(batch) for batch in trained}} <= {{256}}
print(len(trained), manager.steps)
"""


@pytest.mark.full
def test_example_of_the_readme_trains_saves_and_goes_on(tmp_path):
    text = (REPOSITORY / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = AROUND_THE_README.format(example=example)
    for batches in (20, 0):  # the second time nothing is left to train
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.split() == [str(batches), "20"], done.stderr
