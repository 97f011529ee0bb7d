# SPDX-License-Identifier: Apache-2.0
"""``mpi-ckpt run`` with launchers and jobs that are scripts: every way to end, no MPI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import REPOSITORY
from tests.loop import write_script
from tests.waiting import limit, wait_for

# Takes mpirun's place: leaves out its options, runs the job once.
LAUNCHER = """
if [ "$1" = --version ]; then echo "mpirun (Open MPI) 5.0"; exit 0; fi
echo "$@" >>"$0.calls"
while [ $# -gt 0 ]; do
    case $1 in -x | -n | --host) shift 2 ;; *) break ;; esac
done
"$@"
"""

# $n is the number of the attempt, note EVENT STEP what a job's manager would note.
JOB = """
n=$(cat "$0.count" 2>/dev/null || echo 0); n=$((n + 1)); echo $n >"$0.count"
note() {{
    printf '{{"event": "%s", "step": %s, "error": "%s"}}\\n' "$1" "$2" "${{3:-}}" \\
        >>"$MPI_CKPT_NOTES.a-1.jsonl"
}}
{}
"""


class Site:
    """A directory with a launcher and a job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script("mpirun", LAUNCHER)
        self.started: list[subprocess.Popen[str]] = []

    def script(self, name: str, text: str) -> Path:
        return write_script(self.folder / name, text)

    def job(self, text: str) -> Path:
        return self.script("job", JOB.format(text))

    def start(self, *words: object) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "mpi_ckpt",
            "run",
            "--backoff",
            "0",
            *map(str, words),
        ]
        if "--np" not in command:
            command[4:4] = ["--np", "4"]
        path = f"{self.folder}:{os.environ['PATH']}"
        self.started.append(
            subprocess.Popen(
                [*command, "--", str(self.folder / "job"), "--json"],
                cwd=self.folder,
                env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return self.started[-1]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=limit(60))
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def log(self) -> list[dict]:
        text = (self.folder / "mpi-ckpt-run" / "attempts.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def calls(self) -> list[str]:
        return (self.folder / "mpirun.calls").read_text().splitlines()

    def until(self, name: str) -> str:
        assert wait_for((self.folder / name).exists)
        return (self.folder / name).read_text()


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=limit(30))


def outcomes(site: Site) -> list[str]:
    return [attempt["outcome"] for attempt in site.log()]


def test_job_is_started_until_it_has_finished(site):
    site.job(
        """case $n in
        1) note started 0; note saved 10; note preempted 12; exit 143 ;;
        2) note started 0; note restored 12; note saved 20; exit 137 ;;
        3) note started 0; note restored 20; exit 0 ;;
        *) echo hello; note started 0; note restored 20; note finished 30 ;;
        esac"""
    )
    done = site.run()
    assert done.returncode == 0, done.stderr
    assert outcomes(site) == ["preempted", "failed", "lost", "finished"]
    log = site.log()
    assert [attempt["code"] for attempt in log] == [143, 137, 0, 0]
    assert [(attempt["step_from"], attempt["step_to"]) for attempt in log] == [
        (0, 10), (12, 20), (20, 20), (20, 30),
    ]  # fmt: skip
    assert "hello" in done.stdout
    assert "finished; log: " in done.stdout
    assert site.calls() == [f"-x MPI_CKPT_NOTES -n 4 {site.folder}/job --json"] * 4
    assert [path.name for path in (site.folder / "mpi-ckpt-run").iterdir()] == [
        "attempts.jsonl"
    ]


def test_json_is_alone_on_standard_output(site):
    site.job("echo hello; note started 0; note finished 3")
    done = site.run("--json")
    answer = json.loads(done.stdout)
    assert answer["finished"] is True
    assert answer["attempts"] == site.log()
    assert "hello" in done.stderr


@pytest.mark.parametrize(
    ("job", "words", "count", "reason"),
    [
        ("note failed 7 'ValueError: x'; exit 1", [], 3, "3 times"),
        ("exit 3", [], 3, "the same failure 3 times at step 0"),
        ("exit 0", [], 3, "has recorded nothing"),
        ("note restored $n; exit 3", ["--max-restarts", 1], 2, "limit of 1 restarts"),
        ("no-such-command-at-all", [], 3, "exit code 127"),
        ("kill -9 $$", [], 3, "exit code 137"),
    ],
)
def test_job_that_fails_at_once_ends_the_loop(site, job, words, count, reason):
    site.job(job)
    done = site.run(*words)
    assert done.returncode != 0
    assert len(site.log()) == count
    assert reason in done.stdout + done.stderr


def test_exit_code_alone_is_taken_when_asked_for(site):
    site.job("exit 0")
    done = site.run("--trust-exit-code", "--np", "1")
    assert done.returncode == 0
    assert "attempt 1: 1 rank\n" in done.stdout + done.stderr
    assert outcomes(site) == ["finished"]


def test_preemption_is_left_to_the_scheduler_when_asked_for(site):
    site.job("note started 0; note preempted 5; exit 143")
    assert site.run("--stop-when-preempted").returncode == 143
    assert outcomes(site) == ["preempted"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_is_passed_on_as_a_request_to_save_and_ends_the_loop(site, number):
    site.script("mpirun", LAUNCHER.replace('"$@"\n', 'exec "$@"\n'))
    site.job(
        """trap 'note preempted 5; exit 143' USR1
        note started 0; touch up; while :; do sleep 0.05; done"""
    )
    process = site.start()
    site.until("up")
    process.send_signal(number)
    out, err = process.communicate(timeout=limit(60))
    assert process.returncode == 143, err
    assert "asked to stop" in out
    assert outcomes(site) == ["preempted"]


def test_second_signal_ends_a_job_that_does_not_stop(site):
    site.script("mpirun", LAUNCHER.replace('"$@"\n', 'exec "$@"\n'))
    site.job("trap '' USR1; touch up; while :; do sleep 0.05; done")
    process = site.start()
    site.until("up")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=limit(60))
    assert process.returncode == 143


def test_signal_between_two_attempts_ends_the_loop(site):
    site.job("touch up; exit 3")
    process = site.start("--backoff", 50)
    site.until("mpi-ckpt-run/attempts.jsonl")  # the attempt is over, the pause has begun
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=limit(40))
    assert process.returncode == 3
    assert len(site.log()) == 1


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_of_an_attempt_outlives_it(site):
    """A rank that its launcher has left behind, in a group of its own, and deaf."""
    site.job(
        """set -m
        ( trap '' TERM HUP USR1; sleep 300 ) & echo $! >orphan.$n
        note restored $n; exit 3"""
    )
    site.run("--max-restarts", 1)
    orphans = [int((site.folder / f"orphan.{n}").read_text()) for n in (1, 2)]
    assert wait_for(lambda: not any(map(is_alive, orphans)))


def test_attempt_without_a_sign_of_life_is_ended(site):
    site.job(
        """case $n in
        1) note started 0; note saved 5; trap '' TERM; while :; do sleep 0.1; done ;;
        *) note started 0; note finished 9 ;;
        esac"""
    )
    done = site.run("--timeout", 2)
    assert done.returncode == 0, done.stderr
    assert outcomes(site) == ["hung", "finished"]


def test_hosts_script_is_asked_before_each_attempt_and_ranks_follow(site):
    script = site.script(
        "hosts",
        """m=$(cat "$0.asked" 2>/dev/null || echo 0); m=$((m + 1)); echo $m >"$0.asked"
        case $m in
        1) echo a:2; echo b:2 ;;
        2) echo a:2 ;;
        3) echo gibberish here ;;
        *) echo a:2; echo b:2; echo c:2 ;;
        esac""",
    )
    site.job("note started 0; note restored $n; [ $n = 4 ] || exit 9; note finished 9")
    done = site.run("--min-np", 2, "--hosts-script", script)
    assert done.returncode == 0, done.stderr
    hosts = [attempt["hosts"] for attempt in site.log()]
    assert hosts == [["a", "b"], ["a"], ["a"], ["a", "b"]]
    assert [attempt["np"] for attempt in site.log()] == [4, 2, 2, 4]
    assert "its last answer is used" in done.stderr
    assert "--host a:2,b:2 " in site.calls()[0]


def test_hosts_of_the_last_attempt_are_taken_before_new_ones(site):
    script = site.script(
        "hosts",
        """m=$(cat "$0.asked" 2>/dev/null || echo 0); m=$((m + 1)); echo $m >"$0.asked"
        [ $m = 1 ] || echo new:2
        echo a:2; echo b:2""",
    )
    site.job("note started 0; note restored $n; [ $n = 2 ] || exit 9; note finished 9")
    done = site.run("--hosts-script", script)
    assert done.returncode == 0, done.stderr
    assert [attempt["hosts"] for attempt in site.log()] == [["a", "b"], ["a", "b"]]


def copies(site, code=0):
    """Let the launcher note rescues instead of starting them; return the hosts of each."""
    site.script(
        "mpirun",
        LAUNCHER.replace(
            "while [", f'case "$*" in *" rescue "*) exit {code} ;; esac\nwhile [', 1
        ),
    )

    def found():
        lines = [line.split() for line in site.calls() if " rescue " in line]
        assert all(
            line[-3:] == ["rescue", "/ssd/me", f"{site.folder}/run"] for line in lines
        )
        return [
            line[line.index("--host") + 1] if "--host" in line else "" for line in lines
        ]

    return found


def test_what_a_host_keeps_is_copied_before_an_attempt_leaves_it(site):
    (site.folder / "hosts").write_text("a:2\nb:2\nc:2\n")
    site.job(
        """note started 0; note restored $n
        [ $n = 1 ] || { note finished 9; exit 0; }
        echo "prterun noticed that process rank 3 with PID 9 on node b exited on" >&2
        exit 137"""
    )
    rescued = copies(site)
    words = ("--hostfile", site.folder / "hosts", "--rescue", "/ssd/me", "run")
    done = site.run(*words)
    assert done.returncode == 0, done.stderr
    assert [attempt["hosts"] for attempt in site.log()] == [["a", "b"], ["a", "c"]]
    assert rescued() == ["a:1,b:1"]
    assert "copying what hosts keep" in done.stderr


@pytest.mark.parametrize("code", [0, 1])
def test_what_hosts_keep_is_copied_when_the_loop_gives_up(site, code):
    site.job("note started 0; note restored 5; exit 9")
    rescued = copies(site, code)
    done = site.run("--rescue", "/ssd/me", "run")
    assert done.returncode == 9
    assert len(site.log()) == 3
    assert rescued() == [""]
    assert ("was not copied: the rescue ended with code 1" in done.stderr) == bool(code)


def test_a_host_that_is_gone_when_the_loop_gives_up_is_not_asked(site):
    script = site.script(
        "hosts",
        """m=$(cat "$0.asked" 2>/dev/null || echo 0); m=$((m + 1)); echo $m >"$0.asked"
        echo a:2; [ $m = 1 ] && echo b:2; true""",
    )
    site.job("note started 0; note restored 5; exit 9")
    rescued = copies(site)
    words = ("--hosts-script", script, "--rescue", "/ssd/me", "run")
    assert site.run("--max-restarts", 0, *words).returncode == 9
    assert [attempt["hosts"] for attempt in site.log()] == [["a", "b"]]
    assert rescued() == ["a:1"]


def test_a_host_that_cannot_be_reached_keeps_no_other_from_being_copied(site):
    (site.folder / "hosts").write_text("a:2\nb:2\n")
    site.job("note started 0; note restored 5; exit 9")
    rescued = copies(
        site,
        """0$(case "$*" in *b:1*)
        echo "ssh: connect to host b port 22: No route to host" >&2; echo 1 ;; esac)""",
    )
    words = ("--hostfile", site.folder / "hosts", "--rescue", "/ssd/me", "run")
    done = site.run("--max-restarts", 0, *words)
    assert rescued() == ["a:1,b:1", "a:1"]
    assert "once more, without b" in done.stderr
    assert "was not copied" not in done.stderr


def test_a_host_is_copied_from_when_its_second_failure_leaves_it_out(site):
    (site.folder / "hosts").write_text("a:4\nb:4\n")
    site.job(
        """note started 0; note restored $n
        [ $n = 4 ] && { note finished 9; exit 0; }
        hosts=(a b a)
        echo "prterun noticed that process rank 3 with PID 9 on node ${hosts[n - 1]}" \\
            "exited on" >&2
        exit 137"""
    )
    rescued = copies(site)
    words = ("--hostfile", site.folder / "hosts", "--rescue", "/ssd/me", "run")
    assert site.run(*words).returncode == 0
    hosts = [attempt["hosts"] for attempt in site.log()]
    assert hosts == [["a"], ["b"], ["a"], ["b"]]
    assert rescued() == ["a:1", "b:1", "a:1"]


def test_nothing_is_copied_from_hosts_that_are_gone_or_of_a_job_that_finished(site):
    script = site.script(
        "hosts",
        """m=$(cat "$0.asked" 2>/dev/null || echo 0); m=$((m + 1)); echo $m >"$0.asked"
        if [ $m = 1 ]; then echo a:4; else echo new:4; fi""",
    )
    site.job("note started 0; note restored $n; [ $n = 2 ] || exit 9; note finished 9")
    rescued = copies(site)
    done = site.run("--hosts-script", script, "--rescue", "/ssd/me", "run")
    assert done.returncode == 0, done.stderr
    assert rescued() == []


@pytest.mark.parametrize(
    ("text", "told"),
    [("exit 7", "code 7"), ("sleep 60", "hung"), ("echo '?'", "form host:slots")],
)
def test_hosts_script_that_never_answers_ends_the_loop(site, text, told):
    site.job("exit 0")
    script = site.script("hosts", text)
    seconds = 1 if "sleep" in text else 30
    done = site.run("--hosts-script", script, "--script-timeout", seconds)
    assert done.returncode == 1
    assert told in done.stderr
    assert not (site.folder / "mpirun.calls").exists()


def test_host_that_failed_twice_is_left_out(site):
    (site.folder / "hosts").write_text("a:2\nb:2\n")
    site.job(
        """note started 0; note restored $n
        [ $n -lt 3 ] || { note finished 9; exit 0; }
        echo "prterun noticed that process rank 3 with PID 9 on node b exited on" >&2
        exit 137"""
    )
    done = site.run("--min-np", 2, "--hostfile", site.folder / "hosts")
    assert done.returncode == 0, done.stderr
    assert [attempt["hosts"] for attempt in site.log()] == [["a", "b"], ["a", "b"], ["a"]]
    assert [attempt["left_out"] for attempt in site.log()] == [[], ["b"], []]
    assert "left out from now on: b" in done.stderr


def test_too_few_hosts_are_waited_for_and_then_told(site):
    (site.folder / "hosts").write_text("a:2\n")
    site.job("exit 0")
    done = site.run("--hostfile", site.folder / "hosts", "--patience", 0)
    assert done.returncode == 1
    assert "2 slots on 1 hosts, 4 are needed" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--np", "0"], "0 is not in the range"),
        (["--np", "2", "--min-np", "3"], "--min-np exceeds --np"),
        (["--launcher", "no-such-mpirun"], "no-such-mpirun is not in PATH"),
        (["--launcher", "ls"], "is no launcher of"),
        (["--hostfile", "missing"], "does not exist"),
        (["--hostfile", "job", "--hosts-script", "job"], "not both"),
        (["--hostfile", "job"], "is not of the form host:slots"),
    ],
)
def test_wrong_use_is_told_before_anything_is_started(site, words, told):
    site.job("exit 0")
    done = site.run(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (site.folder / "mpirun.calls").exists()


def test_program_that_is_not_there_is_told(site):
    done = site.run()
    assert done.returncode == 2
    assert "job is not in PATH" in done.stderr
