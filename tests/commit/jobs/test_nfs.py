# SPDX-License-Identifier: Apache-2.0
"""Jobs on two mounts of one NFS server: scripts/nfs, where Debian's packages are unpacked.

The short form stops the server once; ``MPI_CKPT_TEST_STRESS`` at every change of a save.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.draws import STRESS
from tests.launch import REPOSITORY, environment

SCRIPT = REPOSITORY / "scripts" / "nfs"
CANNOT = 77
SECONDS = 1800 if STRESS else 400

pytestmark = pytest.mark.timeout(SECONDS + 60)


def nfs(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *words],
        env=environment({"NFS_LIMIT_SECONDS": str(SECONDS), **extra}),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS + 30,
    )


@pytest.fixture(scope="module")
def guest():
    checked = nfs("check")
    if checked.returncode == CANNOT:
        pytest.skip(checked.stderr.strip())
    assert checked.returncode == 0, checked.stderr
    return nfs


def test_jobs_on_two_mounts_see_and_exclude_each_other_and_outlive_the_server(guest):
    program = ("-m", "tests.programs.two_mounts", "every" if STRESS else "some")
    done = guest("run", sys.executable, *program)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["saves_seen"] == (50 if STRESS else 6)
    assert counts["turns"] == counts["saves_seen"] // 2
    assert counts["stops"] >= counts["failed_saves"] >= 1
    assert all(counts["features"].values()), counts


@pytest.mark.long  # one start of a guest shows it in each run
def test_a_guest_hands_on_output_and_exit_code(guest):
    done = guest("run", "sh", "-c", "echo in $NFS_MOUNTS; exit 3")
    assert (done.returncode, done.stdout) == (3, "in /mnt/one:/mnt/two\n"), done.stderr


def test_what_is_missing_is_told(tmp_path):
    for words in (("check",), ("run", "true")):
        done = nfs(*words, NFS_PACKAGES=str(tmp_path / "none"))
        assert done.returncode == CANNOT
        assert "nfs: " in done.stderr
    assert nfs("sideways").returncode == 2
    assert nfs("run").returncode == 2
