# SPDX-License-Identifier: Apache-2.0
"""What torch tests itself with, in one save and one restore of several ranks."""

import pytest
from mpi4py import MPI

from mpi_ckpt.errors import CheckpointError, StageError
from tests.ranks import manager, same_error

pytest.importorskip(
    "tests.conformance.torch_db",
    reason="torch's own lists of optimizers and modules need the package expecttest",
    exc_type=ImportError,
)

from tests.conformance.subjects import FRESH, SAVED, require_same
from tests.conformance.table import CASES, reason

# What takes longest comes with the long run: the values of both are tried alone as well.
LONG = ("modules", "elements")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES
    ],
)
def savable(request):
    """Return what can be saved by name, a case and a subject that has gone a step.

    And the reasons of the refusals, with the first case of each. Of a module's
    configurations with the same entries, the first: alone it is done with each of them.
    """
    if MPI.COMM_WORLD.size != 2:
        pytest.skip("it takes 2 ranks: alone test_table.py does it, more only take longer")
    found, refused, seen = {}, {}, set()
    for case in CASES[request.param]():
        subject = case.make(SAVED)
        if case.group == "Modules":
            form = f"{case.what} {subject.entries()}"
            if form in seen:
                continue
            seen.add(form)
        subject.advance()
        try:
            subject.state("subject").capture()
        except CheckpointError as error:
            refused.setdefault(reason(str(error)), case)
            continue
        found[f"state {len(found)}"] = case, subject
    return found, refused


def test_all_that_can_be_saved_comes_back_from_one_save(comm, shared_path, savable):
    saved, _ = savable
    assert len(saved) > 20
    with manager(
        shared_path, *(subject.state(n) for n, (_, subject) in saved.items())
    ) as root:
        assert root.save().sync.bytes_sent == 0
    live = {name: case.make(FRESH) for name, (case, _) in saved.items()}
    with manager(shared_path, *(subject.state(n) for n, subject in live.items())) as root:
        root.restore()
    for name, (case, subject) in saved.items():
        require_same(case, subject, live[name])


@pytest.mark.parametrize("savable", ["elements"], indirect=True)
def test_every_refusal_is_one_error_that_names_state_and_leaf(comm, shared_path, savable):
    assert len(savable[1]) > 5
    for number, (words, case) in enumerate(savable[1].items()):
        with manager(shared_path / str(number), case.make(SAVED).state("odd")) as root:
            with same_error(comm, StageError, "'odd'", "x") as caught:
                root.save()
            assert words.split(":")[0].split("'")[0] in str(caught.error)
