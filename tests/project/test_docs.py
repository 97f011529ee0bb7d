# SPDX-License-Identifier: Apache-2.0
"""The documents name what there is."""

import contextlib
import difflib
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpi4py import MPI  # noqa: F401 (a test would leave what starting it opens)

import mpi_ckpt
from mpi_ckpt import Local
from mpi_ckpt.engine.hosts.local_settings import LOCAL_ENVIRONMENT
from mpi_ckpt.options import ENVIRONMENT, IO, Options, StopWhen
from tests.project import listings, rooms
from tests.project.pages import shows, take

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")])


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


def test_the_settings_of_local_are_in_its_page_with_their_variables():
    text = (REPOSITORY / "docs" / "local.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", text, re.MULTILINE)
    found = {name: re.findall(r"MPI_CKPT_\w+", cell) for name, cell in rows}
    variables = {name: [one] for one, (name, _) in LOCAL_ENVIRONMENT.items()}
    assert found == {one.name: variables.get(one.name, []) for one in fields(Local)}
    assert set(re.findall(r"MPI_CKPT_LOCAL\w*", text)) == set(LOCAL_ENVIRONMENT)


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
    assert lines["ARCHITECTURE.md"] <= 330


@pytest.mark.parametrize("document", listings.DOCUMENTS, ids=lambda path: path.name)
def test_the_programs_in_documents_are_those_of_today(document):
    text = document.read_text()
    assert listings.with_listings(text) == text, "python -m tests.project.listings --write"


def test_the_picture_of_the_rooms_is_of_today():
    assert rooms.shown() == rooms.picture(), "python -m tests.project.rooms --write"


def test_each_room_is_described():
    described = re.findall(
        r"^\| (`[a-z/]+`|plain values) \| ", rooms.DOCUMENT.read_text(), re.MULTILINE
    )
    drawn = {room for arrow in rooms.arrows() for room in arrow}
    families = {room for room in drawn if room.startswith("integrations/")}
    assert {name.strip("`") for name in described} == drawn - families


def test_no_arrow_leads_up():
    order: TopologicalSorter[str] = TopologicalSorter()
    for above, below in rooms.arrows():
        order.add(above, below)
    order.prepare()  # raises where rooms import one another


@shows("docs/elastic.md", 3)
def test_example_of_rescaling_keeps_the_schedule():
    torch = pytest.importorskip("torch")

    def make(rate):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)

    optimizer, scheduler = make(0.25)
    expected, other = make(0.5)
    restoring = SimpleNamespace(restore=lambda on_resize: on_resize(2, 4))
    found = {"optimizer": optimizer, "scheduler": scheduler, "manager": restoring}
    exec(take("docs/elastic.md", 3), found)
    for _ in range(3):
        assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
        for tested, schedule in ((optimizer, scheduler), (expected, other)):
            tested.step()
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


def program_of_the_readme():
    return take("README.md", 0)


def example_of_the_readme():
    """Return the program without the model and the data, which are the reader's."""
    program = program_of_the_readme()
    start, end = program.index("dataset, model ="), program.index("sampler =")
    return program[:start] + program[end:]


@shows("README.md", 0)
def test_program_of_the_readme_runs_as_it_stands(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "train.py").write_text(program_of_the_readme())
    for batches in (True, False):  # the second time nothing is left to train
        done = subprocess.run(
            [sys.executable, "-W", "error", "train.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 2 - batches


@pytest.mark.long
def test_example_of_the_readme_trains_saves_and_goes_on(tmp_path):
    example = example_of_the_readme()
    program = AROUND_THE_README.format(example=example)
    for batches in (20, 0):  # the second time nothing is left to train
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.split() == [str(batches), "20"], done.stderr


DISTURBED_README = """
import os, random, signal, sys
import numpy as np
import torch

stop_at, how = int(sys.argv[1]), int(sys.argv[2])
for seed in (random.seed, np.random.seed, torch.manual_seed):
    seed(1)
dataset = torch.randn(60 * 256, 4)
parts = torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)
model = torch.nn.Sequential(*parts)
optimizer = torch.optim.Adam(model.parameters())
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=600)

def train(batch):
    loss = model(batch + np.random.rand() + random.random()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if manager.steps + 1 == stop_at:
        os.kill(os.getpid(), how)
{example}
weights = [p.detach().numpy().tobytes().hex() for p in model.parameters()]
rates = [group["lr"] for group in optimizer.param_groups]
print(manager.steps, weights, rates, torch.rand(2), np.random.rand(), random.random())
"""


def test_example_of_the_readme_resumes_bit_for_bit(tmp_path):
    program = tmp_path / "train.py"
    program.write_text(DISTURBED_README.format(example=example_of_the_readme()))

    def run(folder, stop_at, how):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(program), str(stop_at), str(int(how))]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env=environment
        )

    undisturbed = run(tmp_path / "undisturbed", 0, 0)
    assert undisturbed.stdout.startswith("600 "), undisturbed.stderr
    # Asked to stop in mid-epoch; killed in mid-epoch, after the save of step 500.
    stopped = run(tmp_path / "disturbed", 130, signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    killed = run(tmp_path / "disturbed", 550, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "disturbed", 0, 0)
    assert resumed.stdout == undisturbed.stdout, resumed.stderr


@shows("docs/elastic.md", 2)
def test_recipe_of_epochs_resumes_with_the_next_one(tmp_path):
    torch = pytest.importorskip("torch")
    block = take("docs/elastic.md", 2)

    def run(until):
        evaluated, steps = [], []

        def evaluate(epoch):
            evaluated.append(epoch)
            if epoch == until:
                raise InterruptedError  # ends this run, not having saved its epoch

        module = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        sampler = mpi_ckpt.ElasticSampler(8, 4)
        found = {
            **vars(mpi_ckpt),
            **{name: getattr(mpi_ckpt, name) for name in mpi_ckpt.__all__},
            "training": mpi_ckpt.TrainState(
                module=module, optimizer=optimizer, scheduler=scheduler
            ),
            "scheduler": scheduler,
            "sampler": sampler,
            "loader": sampler,
            "directory": tmp_path,
            "train": steps.append,
            "evaluate": evaluate,
        }
        optimizer.step()  # a scheduler wants one before it
        with contextlib.suppress(InterruptedError):
            exec(block, found)
        return evaluated, len(steps), scheduler.last_epoch

    assert run(3) == ([0, 1, 2, 3], 8, 4)
    assert run(None) == ([3, 4, 5, 6, 7, 8, 9], 14, 10)
    assert run(None) == ([], 0, 10)


@pytest.mark.parametrize(
    ("plain", "saved", "most"),
    [
        ("horovod_plain.py", "horovod_saved.py", 10),
        ("plain_torch.py", "saved_torch.py", 20),
    ],
)
def test_few_lines_of_a_script_change(plain, saved, most):
    """What the tutorials say; docstrings count, empty lines and deeper indents do not."""
    before, after = (
        [line.strip() for line in (REPOSITORY / "examples" / name).read_text().splitlines()]
        for name in (plain, saved)
    )
    changes = [line for line in difflib.ndiff(before, after) if line.startswith("+ ")]
    assert len([line for line in changes if line.strip("+ ")]) <= most


NAMED = re.compile(r"`[^`\n]*?([\w./*-]*\btest_\w+\.py)[^`\n]*`")
"""A file of tests, in a document."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_of_tests_that_a_document_names_is_there(document):
    there = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.rglob("test_*.py")]
    named = NAMED.findall(document.read_text())
    assert [
        n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in there)
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_folder_and_script_that_a_document_names_is_there(document):
    named = re.findall(r"`(?:[^`\n]* )?((?:tests|scripts)/[\w./*-]+)", document.read_text())
    assert [n for n in named if not list(REPOSITORY.glob(n))] == []


def section(text, title):
    """Return what stands under a title, up to the next of its kind or above."""
    level = title.split()[0]
    rest = text.partition(f"\n{title}\n")[2]
    return re.split(rf"^#{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def first_cells(text):
    """Return the first cell of each row of a table, but for its head."""
    rows = re.findall(r"^\| (.*?) \| .*\|$", text, re.MULTILINE)
    return [row for row in rows if row not in ("what happens", "claim")]


def test_every_guarantee_names_its_tests():
    text = (REPOSITORY / "docs" / "guarantees.md").read_text()
    tested = (REPOSITORY / "docs" / "tested.md").read_text()
    proven = section(tested, "## Claim by claim")
    numbered = re.findall(r"^(\d)\. \*\*(.*?)\.?\*\*", text, re.MULTILINE)
    claims = [f"{number} {words[0].lower()}{words[1:]}" for number, words in numbered]
    claims += first_cells(
        section(text, "## What you can rely on when something goes wrong")
    )
    assert len(claims) > 30
    assert first_cells(proven) == claims
    for row in proven.splitlines():
        if row.startswith("| ") and not row.startswith("| claim |"):
            assert NAMED.search(row), row
