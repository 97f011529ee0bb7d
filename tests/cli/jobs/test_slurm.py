# SPDX-License-Identifier: Apache-2.0
"""scripts/slurm/train.sbatch under a real Slurm: stopped in every way, always comes back.

The short form is stopped three times. With ``MPI_CKPT_TEST_STRESS`` set it is stopped ten
times, in every way there is: some five minutes, most of them Slurm's own delays.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.draws import STRESS
from tests.hosts import installed_mpi
from tests.jobs import PROGRAMS, logged
from tests.launch import REPOSITORY, environment
from tests.programs.exact import train_alone
from tests.waiting import limit, wait_for

SCRIPT = REPOSITORY / "scripts" / "virtual_slurm"
HOSTS = REPOSITORY / "scripts" / "virtual_hosts"
BATCH = REPOSITORY / "scripts" / "slurm" / "train.sbatch"
PROGRAM = PROGRAMS / "exact.py"
CANNOT = 77
NODES = 3
PATIENCE_SECONDS = 240  # Slurm looks at its queue and its nodes only now and then

pytestmark = pytest.mark.timeout(3000 if STRESS else 900)


class Slurm:
    """A Slurm of our own; asked on the login host if its nodes are hosts."""

    def __init__(self, state: str, *, hosts: bool = False) -> None:
        path = os.pathsep.join(
            [sysconfig.get_path("scripts"), os.environ["PATH"], "/usr/sbin"]
        )
        self.env = environment({"VIRTUAL_SLURM": state, "PATH": path})
        self.env["SLURM_CONF"] = f"{state}/slurm.conf"
        self.env["VIRTUAL_SLURM_PORT"] = str(free_ports(NODES + 1))
        self.env["VIRTUAL_HOSTS"] = f"{state}/hosts"
        self.where = [str(HOSTS), "on", "login"] if hosts else []

    def script(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self._run([str(SCRIPT), *map(str, words)])

    def ask(self, *words: object) -> str:
        done = self._run([*self.where, *map(str, words)])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _run(self, command) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit(120),
        )


def free_ports(count: int) -> int:
    """Return the first of some ports in a row that nobody listens on."""
    for first in random.Random().sample(range(20_000, 30_000), 100):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no ports are free")


@pytest.fixture(scope="module")
def slurm():
    if installed_mpi() != "openmpi" and not STRESS:
        pytest.skip("one MPI will do: Slurm's delays are long")
    with slurm_of(NODES) as made:
        yield made


@pytest.fixture
def slurm_of_hosts():
    with slurm_of(4, "--hosts") as made:
        yield made


@pytest.fixture
def slurm_of_disks():
    with slurm_of(7, "--hosts") as made:
        # A rank that waits for a lost one is deaf until it is killed.
        conf = Path(made.env["SLURM_CONF"])
        text = conf.read_text()
        assert "KillWait=120" in text
        conf.write_text(text.replace("KillWait=120", "KillWait=5"))
        made.ask("scontrol", "reconfigure")
        yield made


@contextlib.contextmanager
def slurm_of(nodes: int, *options: str):
    # Not a folder of pytest's: the names of sockets in it must stay short.
    with tempfile.TemporaryDirectory(prefix="mpi_ckpt-") as folder:
        made = Slurm(f"{folder}/slurm", hosts="--hosts" in options)
        up = made.script("up", nodes, *options)
        if up.returncode == CANNOT:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        try:
            yield made
        finally:
            down = made.script("down")
            assert down.returncode == 0, down.stderr


class Training:
    """tests/programs/exact.py as a job of Slurm's."""

    def __init__(
        self,
        slurm: Slurm,
        folder: Path,
        steps: int,
        pace: float,
        *options: str,
        local: str = "",
    ) -> None:
        self.slurm = slurm
        self.folder = folder
        self.steps = steps
        launcher = {"openmpi": "srun --mpi=pmix", "mpich": "srun --mpi=pmi2"}
        slurm.env["LAUNCHER"] = launcher[installed_mpi()]
        words = ["sbatch", "--parsable", f"--chdir={folder}", f"--nodes={NODES}"]
        words += [*options, BATCH]
        words += [sys.executable, PROGRAM, folder, steps, pace, *([local] if local else [])]
        self.job = slurm.ask(*words).strip()

    def starts(self) -> list[tuple[int, int]]:
        """Return step and number of ranks of every start."""
        path = self.folder / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]

    def sources(self) -> list[str]:
        """Return where each start came from."""
        return [
            line.split()[2] for line in (self.folder / "starts").read_text().splitlines()
        ]

    def curve(self) -> list[dict]:
        return logged(self.folder / "curve.jsonl")

    def steps_of(self, start: int) -> int:
        """Return how many steps the last of so many starts has done, 0 before it."""
        starts = self.starts()
        if len(starts) < start:
            return 0
        return self.curve()[-1]["step"] + 1 - starts[-1][0] if self.curve() else 0

    def wait(self, what: str, holds) -> None:
        assert wait_for(holds, PATIENCE_SECONDS, 0.2), f"{what}: {self.told()}"

    def run_on(self, start: int, steps: int = 15) -> None:
        """Return when a start has done some steps."""
        self.wait(f"start {start}", lambda: self.steps_of(start) >= steps)

    def check(self) -> None:
        """Wait for the end; require the losses and weights of a run without a break."""
        self.wait("the end", lambda: "COMPLETED" in self.state())
        losses, weights = train_alone(self.steps)
        assert json.loads((self.folder / "weights.json").read_text()) == weights
        curve = self.curve()
        assert {event["step"] for event in curve} == set(range(self.steps))
        assert [event for event in curve if event["loss"] != losses[event["step"]]] == []

    def state(self) -> str:
        return self.slurm.ask("scontrol", "show", "job", self.job)

    def hosts(self, runs_the_script: bool) -> list[str]:
        """Return the host that runs the batch script, or the others of the job."""
        told = dict(word.split("=", 1) for word in self.state().split() if "=" in word)
        batch, nodes = told["BatchHost"], told["NodeList"]
        names = self.slurm.ask("scontrol", "show", "hostnames", nodes).split()
        assert batch in names
        return [name for name in names if (name == batch) == runs_the_script]

    def told(self) -> str:
        logs = [path.read_text() for path in self.folder.glob("train-*.log")]
        return "\n".join([self.state(), *logs])


def preempt(training: Training, nodes: int, seconds: int) -> None:
    """Let somebody more important take nodes for a while."""
    words = ["sbatch", "--partition=high", f"--nodes={nodes}", "--exclusive"]
    words += ["--output=/dev/null", f"--wrap=sleep {seconds}"]
    training.slurm.ask(*words)


def requeue(training: Training) -> None:
    """Put the job back; it waits until it is released, when it has its new size."""
    training.slurm.ask("scontrol", "requeuehold", training.job)


def resize(training: Training, nodes: int) -> None:
    """Let the job, which waits or is about to, go on with another number of nodes."""
    training.wait("the queue", lambda: "JobState=PENDING" in training.state())
    words = [f"JobId={training.job}", f"NumNodes={nodes}-{nodes}"]
    words += [f"NumTasks={nodes}", f"NumCPUs={nodes}"]
    training.slurm.ask("scontrol", "update", *words)
    training.slurm.ask("scontrol", "release", training.job)


def lose_a_node(training: Training) -> None:
    """Lose a node that the job runs on, not that of its batch script."""
    lost = training.slurm.script("lose", f"node{NODES}")
    assert lost.returncode == 0, lost.stderr


def find_the_node(training: Training) -> None:
    found = training.slurm.script("find", f"node{NODES}")
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(STRESS, reason="the long form is run")
def test_a_port_in_use_is_refused_at_once(tmp_path):
    made = Slurm(str(tmp_path / "slurm"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        made.env["VIRTUAL_SLURM_PORT"] = port = str(taken.getsockname()[1])
        up = made.script("up", 1)
    if up.returncode == CANNOT:
        pytest.skip(up.stderr.strip())
    assert up.returncode == 2
    assert f"port {port} is in use" in up.stderr
    assert not (tmp_path / "slurm").exists()


def test_training_is_preempted_requeued_and_resized(slurm, tmp_path):
    # More steps than it can do before Slurm has looked at its queue.
    training = Training(slurm, tmp_path, 1000, 0.04)
    training.run_on(1)
    preempt(training, 1, 60)
    resize(training, NODES - 1)  # it need not wait for the one that was taken
    training.run_on(2)
    requeue(training)
    resize(training, 1)
    training.check()
    starts = training.starts()
    assert [size for _, size in starts] == [NODES, NODES - 1, 1]
    assert 0 < starts[1][0] < starts[2][0]


@pytest.mark.skipif(STRESS, reason="the long form is run")
def test_cancelled_training_stays_cancelled_with_its_work_saved(slurm, tmp_path):
    training = Training(slurm, tmp_path, 10_000, 0.04)
    training.run_on(1)
    slurm.ask("scancel", training.job)
    training.wait("its end", lambda: "JobState=CANCELLED" in training.state())
    training.wait("its last word", lambda: "preempted; log" in training.told())
    assert len(training.starts()) == 1
    assert "JobState=CANCELLED" in training.state()


@pytest.mark.long  # takes five minutes
def test_training_is_stopped_ten_times_in_every_way(slurm, tmp_path):
    # The time limit: a minute, with USR1 half a minute before its end (Slurm takes that
    # for up to a minute, so some ten seconds are left).
    limits = ["--time=1", "--signal=B:USR1@30"]
    training = Training(slurm, tmp_path, 3000, 0.05, *limits)
    for round in range(3):
        start = 1 + len(training.starts())
        training.run_on(start)
        preempt(training, NODES, 5)
        resize(training, NODES - 1 - round % 2)
        training.run_on(start + 1)
        requeue(training)
        resize(training, NODES)
        training.run_on(start + 2)
        training.wait("its time", lambda n=start + 3: len(training.starts()) >= n)
    start = len(training.starts())
    training.run_on(start)
    lose_a_node(training)
    resize(training, NODES - 1)
    training.run_on(start + 1)
    find_the_node(training)
    training.check()
    starts = training.starts()
    print(starts)
    assert len(starts) >= 11
    assert len({size for _, size in starts}) > 1
    assert [step for step, _ in starts] == sorted(step for step, _ in starts)


@pytest.mark.long  # takes a time limit of Slurm's
def test_training_saves_before_its_time_without_a_signal(slurm, tmp_path):
    # Else Slurm would end it as TIMEOUT, for good. CONT tells nobody anything.
    limits = ["--time=1", "--signal=B:CONT@1"]
    training = Training(slurm, tmp_path, 10_000, 0.05, *limits)
    training.run_on(2)
    slurm.ask("scancel", training.job)
    training.wait("its end", lambda: "JobState=CANCELLED" in training.state())
    assert "preempted; log" in training.told()
    assert training.starts()[1][0] > 0


@pytest.mark.long  # takes two minutes: Slurm waits for silent nodes
def test_training_goes_on_elsewhere_when_its_hosts_lose_their_power(
    slurm_of_hosts, tmp_path
):
    training = Training(slurm_of_hosts, tmp_path, 400, 0.04, "--nodes=2")
    training.run_on(1)
    for start, runs_the_script in [(2, False), (3, True)]:
        (lost, *_) = training.hosts(runs_the_script)
        off = slurm_of_hosts.script("lose", lost)
        assert off.returncode == 0, off.stderr
        training.run_on(start)
        assert lost not in training.hosts(True) + training.hosts(False)
    training.check()
    starts = training.starts()
    print(starts)
    assert [size for _, size in starts] == [2, 2, 2]
    assert 0 < starts[1][0] < starts[2][0]


@pytest.mark.long  # takes minutes: Slurm starts a job again in its own time
def test_training_goes_on_from_its_hosts_when_five_are_lost_with_their_disks(
    slurm_of_disks, tmp_path
):
    """Two nodes train. One is lost; the other one has all, and a fresh one comes to it."""
    state = slurm_of_disks.env["VIRTUAL_HOSTS"]
    fresh = [f"host{number}" for number in range(3, 8)]
    # Else Slurm takes two fresh ones while the one that is left still ends its job.
    for node in fresh:
        hold = ["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=fresh"]
        slurm_of_disks.ask(*hold)
    training = Training(
        slurm_of_disks, tmp_path, 400, 0.05, "--nodes=2", local=f"{state}/local/ckpt"
    )
    training.run_on(1)
    for losses, comes in enumerate(fresh, 1):
        done = training.curve()[-1]["step"]
        # That of the batch script, root's, by turns with the other.
        (lost, *_) = training.hosts(losses % 2 == 1)
        off = slurm_of_disks.script("lose", lost)
        assert off.returncode == 0, off.stderr
        shutil.rmtree(f"{state}/local-of/{lost}/ckpt")
        # As a site's own check of its nodes does, long before Slurm gives one up.
        for node, now in ((lost, "DOWN"), (comes, "RESUME")):
            words = [f"NodeName={node}", f"State={now}", "Reason=lost"]
            slurm_of_disks.ask("scontrol", "update", *words)
        training.run_on(losses + 1)
        assert comes in training.hosts(True) + training.hosts(False)
        # A step may be logged and not be kept yet.
        assert training.starts()[losses][0] >= done - 1, training.told()
        assert not list((tmp_path / "checkpoints").glob("checkpoint-*")), training.told()
    training.check()
    assert training.sources() == ["nothing", *["local"] * 5]
    assert [size for _, size in training.starts()] == [2] * 6
