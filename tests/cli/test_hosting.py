# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpi_ckpt.cli.command import CommandError
from mpi_ckpt.cli.restart.hosting import HostBook, ask_hosts_script, parse_hosts, suspects
from mpi_ckpt.cli.restart.launching import (
    Host,
    Launcher,
    Salvage,
    find_launcher,
    launch_command,
    left_behind,
    place,
    salvage_command,
)


def test_hosts_are_read_in_the_forms_of_both_mpis_and_horovod():
    text = (
        "# ours\nnode1\nnode2:4\n\nnode3 slots=2  # old\nnode2:1\nn-4.site.org slots = 3\n"
    )
    assert parse_hosts(text) == (
        Host("node1", 1), Host("node2", 5), Host("node3", 2), Host("n-4.site.org", 3),
    )  # fmt: skip
    assert parse_hosts("node1 slots=2 max_slots=4") == (Host("node1", 2),)
    assert parse_hosts("") == ()


@pytest.mark.parametrize(
    "line",
    ["-x", "node1:0", "node1:-2", "node 1", "a;b", "$(reboot)", "a:b", "-n:1", "\x1b[0m"],
)
def test_rubbish_is_refused_with_its_line(line):
    with pytest.raises(ValueError, match="line 2, "):
        parse_hosts(f"node1:2\n{line}\n")


@pytest.fixture
def script(tmp_path):
    def make(text: str, mode: int = 0o755):
        path = tmp_path / "hosts.sh"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(mode)
        return path

    return make


def test_script_is_asked(script):
    hosts = ask_hosts_script(script("echo a:2; echo b; echo said >&2"), os.environ, 30)
    assert hosts == (Host("a", 2), Host("b", 1))


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        ("exit 3", 0o755, "ended with code 3"),
        ("echo a:2; kill -9 $$", 0o755, "ended with code -9"),
        ("echo a:2; sleep 60", 0o755, "hung for 1 s"),
        ("echo '<html>'", 0o755, "is not of the form host:slots"),
        ("printf '\\377\\376'", 0o755, "is not of the form host:slots"),
        ("echo a", 0o644, "cannot be run"),
    ],
)
def test_script_that_fails_hangs_or_prints_rubbish_is_told(script, text, mode, told):
    seconds = 1 if "sleep" in text else 30
    with pytest.raises(CommandError, match=told):
        ask_hosts_script(script(text, mode), os.environ, seconds)


def test_host_that_failed_twice_is_left_out_until_it_was_away():
    answers = [Host("a"), Host("b")]
    book = HostBook(lambda: list(answers), pytest.fail)
    assert [host.name for host in book.usable()] == ["a", "b"]
    assert book.blame({"b"}) == []
    assert [host.name for host in book.usable()] == ["a", "b"]
    assert book.blame({"b"}) == ["b"]
    assert [host.name for host in book.usable()] == ["a"]
    assert book.blame({"a"}) == []
    del answers[1]
    assert [host.name for host in book.usable()] == ["a"]
    answers.append(Host("b"))
    assert [host.name for host in book.usable()] == ["a", "b"]
    assert book.blame({"a"}) == ["a"]


def test_survivors_of_the_last_attempt_come_first():
    answers = [Host("new"), Host("a"), Host("b"), Host("c")]
    book = HostBook(lambda: list(answers), pytest.fail)
    assert [host.name for host in book.usable()] == ["new", "a", "b", "c"]
    book.note_used(["c", "a", "b"])
    assert [host.name for host in book.usable()] == ["a", "b", "c", "new"]
    book.blame({"b"})
    assert [host.name for host in book.usable()] == ["a", "c", "new", "b"]
    book.note_used(["new"])
    assert [host.name for host in book.usable()] == ["new", "a", "b", "c"]


def test_one_process_on_each_host_copies_what_it_keeps():
    salvage = Salvage("/ssd/{user}", Path("/scratch/run"))
    told = {
        "Open MPI": "-x MPI_CKPT_NOTES -n 2 --host a:1,b:1",
        "MPICH": "-n 2 -hosts a:1,b:1",
        "srun": "--kill-on-bad-exit=1 --ntasks=2 --nodes=2 --nodelist=a,b",
    }
    for family, words in told.items():
        launcher = Launcher(("launch",), family)
        command = salvage_command(launcher, 8, ["a", "b"], salvage)
        assert " ".join(command[:-6]) == f"launch {words}"
        end = ["-m", "mpi_ckpt", "rescue", "/ssd/{user}", "/scratch/run"]
        assert command[-5:] == end
        alone = salvage_command(launcher, 8, [], salvage)
        assert "8" in " ".join(alone[:-6])


@pytest.mark.parametrize(
    ("last", "there", "chosen", "is_behind"),
    [
        ("ab", "ab", "ab", False),
        ("ab", "abc", "bc", True),
        ("ab", "bc", "bc", False),  # a is gone: nothing can be copied from it
        ("", "ab", "ab", False),
    ],
)
def test_a_host_that_is_there_and_not_used_is_left_behind(last, there, chosen, is_behind):
    assert left_behind(tuple(last), set(there), set(chosen)) is is_behind


def test_last_answer_serves_while_the_source_fails():
    told: list[str] = []
    answers = [[Host("a")], CommandError("hosts script: hung"), [Host("b")]]

    def source():
        answer = answers.pop(0)
        if isinstance(answer, CommandError):
            raise answer
        return answer

    book = HostBook(source, told.append)
    assert [book.usable()[0].name for _ in range(3)] == ["a", "a", "b"]
    assert told == ["hosts script: hung; its last answer is used"]
    answers.append(CommandError("no"))
    with pytest.raises(CommandError):
        HostBook(source, told.append).usable()


def test_launcher_that_knows_its_hosts_is_asked_for_none():
    book = HostBook(None, pytest.fail)
    assert (book.is_known, book.usable()) == (False, [])


HOSTS = [Host("a", 2), Host("b", 2), Host("c", 2)]


@pytest.mark.parametrize(
    ("wanted", "least", "size", "names"),
    [(4, 4, 4, "ab"), (5, 1, 5, "abc"), (8, 4, 6, "abc"), (8, 7, 0, ""), (1, 1, 1, "a")],
)
def test_first_hosts_with_room_are_taken(wanted, least, size, names):
    chosen, hosts = place(HOSTS, wanted, least)
    assert (chosen, "".join(host.name for host in hosts)) == (size, names)


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("Open MPI", "-x MPI_CKPT_NOTES -n 4 --host a:2,b:2"),
        ("MPICH", "-n 4 -hosts a:2,b:2"),
        ("srun", "--kill-on-bad-exit=1 --ntasks=4 --nodes=2 --nodelist=a,b"),
    ],
)
def test_each_launcher_is_told_in_its_own_words(family, told):
    launcher = Launcher(("/bin/launch", "--mine"), family)
    command = launch_command(launcher, 4, HOSTS[:2], ["python", "train.py", "-n", "1"])
    assert " ".join(command) == f"/bin/launch --mine {told} python train.py -n 1"
    alone = " ".join(launch_command(launcher, 4, [], ["p"]))
    assert "host" not in alone
    assert "node" not in alone


def test_launchers_are_found_and_told_apart(tmp_path):
    for name, said in [
        ("mpirun", "mpirun (Open MPI) 5.0"),
        ("mpiexec", "HYDRA build"),
        ("srun", ""),
    ]:
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "odd").write_text("#!/bin/sh\necho odd 1.0\n")
    (tmp_path / "odd").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert find_launcher(None, environ) == Launcher((f"{tmp_path}/mpirun",), "Open MPI")
    assert find_launcher("mpiexec -l", environ) == Launcher(
        (f"{tmp_path}/mpiexec", "-l"), "MPICH"
    )
    found = find_launcher(f"'{tmp_path}/srun' --mpi=pmix", environ)
    assert found == Launcher((f"{tmp_path}/srun", "--mpi=pmix"), "srun")
    for given, told in [
        ("odd", "is no launcher of"),
        ("missing -n", "missing is not in PATH"),
        ("'open", "No closing quotation"),
        ("", "empty"),
    ]:
        with pytest.raises(CommandError, match=told):
            find_launcher(given, environ)


SAID = {
    "Open MPI, a lost daemon": (
        "PRTE has lost communication with a remote daemon.\n\n"
        "  HNP daemon   : [prterun-login-1@0,0] on node a\n"
        "  Remote daemon: [prterun-login-1@0,2] on node b\n"
    ),
    "Open MPI, a killed rank": (
        "prterun noticed that process rank 1 with PID 99 on node b exited on\nsignal 9"
    ),
    "MPICH": "=   PID 17 RUNNING AT b\n=   EXIT CODE: 9\n",
    "Slurm": "srun: error: Node failure on b\nsrun: Job step aborted\n",
    "Slurm, a killed rank": "srun: error: b: task 1: Killed\n",
    "ssh": "ssh: connect to host b port 22: Connection refused\n",
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_launchers_name_the_host_that_failed(said):
    assert suspects(said, ["a", "b", "c"]) == {"b"}
    assert suspects(said, ["c"]) == set()
