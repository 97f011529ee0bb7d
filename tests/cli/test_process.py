# SPDX-License-Identifier: Apache-2.0
"""The command line as its users start it: what it loads, and beside a job that saves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

import mpi_ckpt
from mpi_ckpt.cli import app
from tests.commands import fill, run
from tests.waiting import limit

REPOSITORY = Path(mpi_ckpt.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}

# One command after the other in one process: what one of them loads stays loaded.
WATCH = """
import json, runpy, sys
heavy = {"mpi4py", "mpi4py.MPI", "torch", "mpi_ckpt.comm"}
if sys.version_info >= (3, 11):
    heavy.add("subprocess")  # before, Python's own uuid loads it, and click that
told = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["mpi-ckpt", *words]
    sys.modules.pop("mpi_ckpt.__main__", None)
    try:
        runpy.run_module("mpi_ckpt", run_name="__main__")
    except SystemExit as end:
        told[words[0]] = [end.code or 0, sorted(heavy & set(sys.modules))]
print("\\n" + json.dumps(told))
"""


def test_commands_load_neither_mpi_nor_torch(tmp_path):
    root = str(fill(tmp_path / "c", 2))
    commands = [
        ["ls", root], ["show", root], ["verify", root, "--all"], ["diff", root, "1", "2"],
        ["prune", root, "--keep-last", "1", "--dry-run"],
        ["export", root, "--to", "x.safetensors"], ["quarantine", root, "1"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WATCH, json.dumps(commands)],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=limit(60),
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    expected = {words[0]: [0, []] for words in commands} | {"diff": [1, []]}
    assert told == expected, done.stderr


def start(*words: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mpi_ckpt", *map(str, words)]
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=limit(60),
        **options,
    )


def test_exit_codes_reach_the_shell(tmp_path):
    root = fill(tmp_path / "c", 1)
    assert start("verify", root).returncode == 0
    (root / "checkpoint-00000001" / "a%2Fstream.bin").unlink()
    done = start("verify", root)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert start("verify", tmp_path / "no").returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(tmp_path, closed):
    root = fill(tmp_path / "c", 2)
    words = {"ls": 0, "verify": 0, "ls --json": 0, "show --leaf nope": 2}
    for command, code in words.items():
        verb, *rest = command.split()
        line = f'"$0" -m mpi_ckpt {verb} "$1" {" ".join(rest)} {closed}'
        done = subprocess.run(
            ["sh", "-c", line, sys.executable, str(root)],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=limit(30),
        )  # fmt: skip
        assert done.returncode == code, done
        if code == 0 and ">&-" not in closed.split():
            assert done.stdout
        if "2>&-" in closed.split() and code:
            assert done.stdout + done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("words", "code"),
    [("ls", 1), ("ls --json", 1), ("diff --json", 2), ("--help", 1), ("ls --help", 1)],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full_is_told_in_a_line(tmp_path, words, code, unbuffered):
    root = fill(tmp_path / "c", 2)
    verb, *rest = words.split()
    places = {"ls": [root], "diff": [root, 1, 2]}.get(verb, [])
    command = [sys.executable, "-m", "mpi_ckpt", verb, *map(str, places), *rest]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered}, stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=limit(30),
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "ENOSPC" in done.stderr


def test_without_click_and_rich_it_says_what_to_install():
    program = (
        "import sys\nsys.modules['click'] = sys.modules['rich'] = None\n"
        "import importlib.util\n"
        "importlib.util.find_spec = lambda name: None\n"
        "from mpi_ckpt.cli import main\nmain()\n"
    )
    for arguments in ([], ["ls", "run", "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=limit(60),
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        told = json.loads(done.stdout)["error"] if arguments else {"message": done.stderr}
        assert "pip install 'mpi_ckpt[cli]'" in told["message"]
        assert told.get("exit_code", 2) == 2


def test_every_command_has_help_and_json():
    text = run("--help").stdout
    for name in app._COMMANDS:
        assert f"\n  {name} " in text
        shown = run(name, "--help")
        assert shown.exit_code == 0
        assert "--json" in shown.stdout
    assert mpi_ckpt.__version__ in run("--version").stdout


def complete(words: list[str], incomplete: str) -> list[str]:
    found = ShellComplete(app.cli, {}, "mpi-ckpt", "_MPI_CKPT_COMPLETE")
    return [item.value for item in found.get_completions(words, incomplete)]


def test_generations_are_completed(tmp_path):
    root = fill(tmp_path / "c", 2)
    assert complete([], "ver") == ["verify"]
    assert complete(["show", str(root)], "") == ["2", "1", "newest"]
    assert complete(["show", str(root)], "n") == ["newest"]
    assert complete(["show", str(tmp_path / "no")], "") == []


SAVER = """
import sys
from contextlib import closing
from pathlib import Path
import numpy as np
from mpi_ckpt.options import Options
from mpi_ckpt.retention import KeepLast
from mpi_ckpt.states.arrays import ArrayState
from mpi_ckpt.storage.directory.checkpoint_directory import CheckpointDirectory
from tests.making import save
directory = CheckpointDirectory(Path(sys.argv[1]))
values = np.zeros(20_000)
with closing(directory):
    directory.own()
    number = 0
    while not Path(sys.argv[2]).exists():
        number += 1
        values[:] = number
        done = save(directory, [ArrayState("s", {"x": values})], step=number,
                    options=Options(retention=KeepLast(2)))
        directory.catalog.remove(done.retired, directory.job)
        print(number, flush=True)
"""


def test_readers_are_never_wrong_beside_a_job_that_saves_and_prunes(tmp_path):
    root, stop = tmp_path / "c", tmp_path / "stop"
    job = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(root), str(stop)],
        env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with job:
        try:
            job.stdout.readline()
            for turn in range(25):
                if turn < 6:
                    job.stdout.readline()  # it gets on beside us, however slow the disk
                listed = run("ls", root, "--json")
                assert listed.exit_code == 0
                answer = json.loads(listed.stdout)
                states = {row["state"] for row in answer["generations"]}
                assert states <= {"newest", "ok", "partial", "gone"}, answer
                assert answer["lock_holder"] is not None
                proven = run("verify", root, "--all", "--json")
                assert proven.exit_code == 0, proven.output
                shown = run("show", root, "--json")
                assert shown.exit_code == 0, shown.output
        finally:
            stop.touch()
        job.stdout.read()
    assert job.returncode == 0
    assert run("verify", root, "--all").exit_code == 0
