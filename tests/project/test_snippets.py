# SPDX-License-Identifier: Apache-2.0
"""What the documents show as Python is that of today; the how-to pages run as shown."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import textwrap

import pytest

import mpi_ckpt
from tests.project.pages import REPOSITORY, RUN_BY, all_blocks, blocks_of

BLOCKS = all_blocks()
SHOWN = [pytest.param(one.text, id=f"{one.page}-{one.number}") for one in BLOCKS]


def parsed(block):
    """Return the tree of a block; what a page shows in columns is not Python."""
    try:
        return ast.parse(textwrap.dedent(_in_a_loop(block)))
    except SyntaxError:
        assert "# before" in block, block  # two programs side by side
        return ast.parse("")


def _in_a_loop(block):
    """Return a block that shows the rest of a loop with the heads that it lacks."""
    depth = len(block) - len(block.lstrip(" "))
    heads = [f"{' ' * at}for _ in ():" for at in range(0, depth, 4)]
    return "\n".join([*heads, block])


def called_names(tree):
    """Give each call of a public name, as ``Name(...)`` or ``mpi_ckpt.Name(...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).removeprefix("mpi_ckpt.")
            if name in mpi_ckpt.__all__ and not re.search(r"elastic\.", name):
                yield node, getattr(mpi_ckpt, name)


def method_calls(tree):
    for node in ast.walk(tree):
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_method and ast.unparse(node.func.value) == "manager":
            yield node, getattr(mpi_ckpt.CheckpointManager, node.func.attr)


@pytest.mark.parametrize("block", SHOWN)
def test_shown_programs_name_what_there_is(block):
    tree = parsed(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpi_ckpt"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                is_there = alias.name in dir(module) or hasattr(module, alias.name)
                path = f"{node.module}.{alias.name}"
                assert is_there or importlib.util.find_spec(path), path
    for node, function in [*called_names(tree), *method_calls(tree)]:
        given = [keyword.arg for keyword in node.keywords if keyword.arg]
        known = inspect.signature(function).parameters
        assert set(given) <= set(known), ast.unparse(node)


AROUND = """
import torch

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
dataset = [torch.ones(2) for _ in range(64)]
trained, numbers_written = [], []


def loss_of(model):
    return model(torch.ones(2)).item()


def train(batch):
    batch = torch.stack(batch) if isinstance(batch, list) else batch
    optimizer.zero_grad()
    model(batch).sum().backward()
    optimizer.step()
    trained.append(len(batch))


def write_numbers(numbers, step):
    numbers_written.append((step, numbers))
"""


WHOLE = ["how-to/per-epoch", "how-to/mid-epoch", "how-to/interval", "how-to/disk"]
WHOLE += ["how-to/logging", "reference/errors", "index"]
"""The pages whose blocks run one after the other, with the same names."""


@pytest.mark.parametrize("page", WHOLE)
def test_programs_of_a_page_run_as_shown(page, tmp_path, monkeypatch, own_logging):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    around = AROUND + "from torch.utils.data import DataLoader\n"
    found = {"directory": tmp_path / "run"}
    exec(around, found)
    for block in blocks_of(f"docs/{page}.md"):
        exec(compile(block.text, page, "exec"), found)
    if page == "how-to/per-epoch":
        assert len(found["trained"]) == 3 * 64
    if page == "how-to/mid-epoch":
        assert found["trained"] == [32] * 6
    if page == "how-to/logging":
        ((step, numbers),) = found["numbers_written"]
        assert (step, numbers["checkpoint/generation"]) == (0, 1)


def test_pages_resume_where_they_say(tmp_path):
    """A second run of a page finds its work done: it trains on nothing."""
    pytest.importorskip("torch")
    for page in ("per-epoch", "mid-epoch"):
        (block,) = blocks_of(f"docs/how-to/{page}.md")
        for expected in (True, False):
            found = {"directory": tmp_path / page}
            exec(AROUND, found)
            exec(compile(block.text, page, "exec"), found)
            assert bool(found["trained"]) == expected


def test_every_block_is_run_by_a_test():
    for module in ("project.test_docs", "project.test_fragments", "programs.shown_blocks"):
        if module.startswith("programs"):
            pytest.importorskip("torch")
        importlib.import_module(f"tests.{module}")
    whole = {f"docs/{page}.md" for page in WHOLE}
    blocks = {(one.page, one.number): one for one in BLOCKS}
    assert set(RUN_BY) <= set(blocks)
    assert not whole & {page for page, _ in RUN_BY}
    assert whole <= {page for page, _ in blocks}
    left = [
        f"{block.page}-{block.number}"
        for key, block in blocks.items()
        if key not in RUN_BY and block.page not in whole and not started(block.listing)
    ]
    assert left == []


def started(program):
    """Return whether tests that start jobs name an example."""
    if program is None:
        return False
    name = f'"{program.removeprefix("examples/")}"'
    tests = (REPOSITORY / "tests").glob("*/jobs/test_*.py")
    return any(name in path.read_text() for path in tests)
