# SPDX-License-Identifier: Apache-2.0
"""Single I/O faults: every call of the library's writer fails once, or from then on.

After SQLite's "test the Nth call": a workload runs with the first call of a kind failing,
then with the second, and so on until none fires any more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import shutil
import stat
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt import IO
from mpi_ckpt.errors import CheckpointError, RestoreError, SaveError
from mpi_ckpt.storage.format.layout import QUARANTINE, generation_number
from tests.crash.recorder import in_place_of_os
from tests.crash.replay import PIECE, write_image
from tests.crash.scenarios import ROOT, saved_image
from tests.crash.world import Saved, Training, empty, leftovers, scratch
from tests.draws import COUNTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.crash.replay import Image

CALLS = (
    "open",
    "pwrite",
    "fsync",
    "mkdir",
    "rename",
    "link",
    "unlink",
    "rmdir",
    "listdir",
    "preadv",
    "lstat",
    "posix_fallocate",
    "ftruncate",
    "close",
    "fstat",
    "statvfs",
)
ERRNOS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.ESTALE,
    errno.EFBIG,
    errno.EINTR,
    errno.ENOENT,
    errno.EMFILE,
)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        call: Name of the function of ``os``.
        nth: Which of its calls fails, counted from 1.
        errno: How.
        forever: Whether all later calls fail as well.
    """

    call: str
    nth: int
    errno: int
    forever: bool = False

    def __str__(self) -> str:
        often = "from then on" if self.forever else "once"
        return (
            f"{self.call} no. {self.nth} fails with {errno.errorcode[self.errno]} {often}"
        )

    @property
    def hides_all(self) -> bool:
        """Whether no listing is true: to the C library ENOENT is the end of one."""
        return self.forever and (self.call, self.errno) == ("getdents64", errno.ENOENT)

    def untold(self, error: CheckpointError) -> str | None:
        """Return what an error that came of it does not say; None if it says all."""
        # What is not there is told in words that say what it means.
        if self.errno == errno.ENOENT and any(text in str(error) for text in NOT_THERE):
            return None
        name = errno.errorcode[self.errno]
        if name not in str(error) or error.errno != self.errno:
            return f"{name} is not told: {error}"
        return None


NOT_THERE = (
    "does not show",
    "no lock file",
    "this host does not see it",
    "does not exist and cannot be made",
)
"""What errors say of a directory, a lock file, a partial and a root that are missing."""

LIES = ("empty", "short", "old")


@dataclass(frozen=True)
class Lie(Fault):
    """A listing that is not true, and fails with no error.

    Attributes:
        kind: ``"empty"``; ``"short"``: the newer half of the names is missing; ``"old"``:
            as it was when this was made, or empty.
        before: What was in each directory when this was made.
    """

    kind: str = "empty"
    before: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        often = "from then on" if self.forever else "once"
        return f"listing no. {self.nth} is {self.kind} {often}"

    @property
    def hides_all(self) -> bool:
        """Whether no listing is true."""
        return self.forever

    def untold(self, error: CheckpointError) -> str | None:
        """It has no name; that a file is named is required of all errors."""
        return None

    def listing(self, path: Any, names: list[str]) -> list[str]:
        """Return what is shown in place of the truth."""
        if self.kind == "short":
            return sorted(names)[: len(names) // 2]
        return self.before.get(str(path), []) if self.kind == "old" else []


class Faulty:
    """An ``os`` of which one call fails, in place of a real one or a recorder."""

    def __init__(
        self, fault: Fault, inner: Any = os, *, sandbox: Path | None = None
    ) -> None:
        if isinstance(fault, Lie) and sandbox is not None:
            found = {folder: [*dirs, *files] for folder, dirs, files in os.walk(sandbox)}
            fault = replace(fault, before=found)
        self.fault = fault
        self.fired = 0
        self.retried: list[str] = []
        self._inner = inner
        self._calls = itertools.count(1)  # counts right from several threads
        self._failed: list[int] = []  # descriptors of files whose fsync failed

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._inner, name)
        if name == "fsync":
            function = self._fsync
        if name != self.fault.call:
            return function
        return lambda *args, **kwargs: self._call(function, *args, **kwargs)

    def in_place(self) -> contextlib.AbstractContextManager[Any]:
        """Take the place of the ``os`` of the library's one writer."""
        return in_place_of_os(self)

    def close_kept(self) -> None:
        """Forget files whose fsync failed."""
        for descriptor in self._failed:
            os.close(descriptor)
        self._failed.clear()

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        fault = self.fault
        number = next(self._calls)
        if number == fault.nth or (fault.forever and number > fault.nth):
            self.fired += 1
            if isinstance(fault, Lie):
                return fault.listing(args[0], function(*args, **kwargs))
            if fault.call == "fsync":
                self._note_failure(args[0])
            paths = [str(path) for path in args[:2] if not isinstance(path, int)]
            if fault.call in ("rename", "link"):
                paths.insert(1, None)
            elif not isinstance(args[0], os.PathLike):
                paths = []  # calls on descriptors tell no name
            if fault.call == "close":  # which closes, whatever it says
                function(*args)
            raise OSError(fault.errno, os.strerror(fault.errno), *paths)
        return function(*args, **kwargs)

    def _fsync(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.retried += [
            f"file {status.st_ino}"
            for failed in self._failed
            if os.path.sameopenfile(failed, descriptor)
        ]
        self._inner.fsync(descriptor)

    def _note_failure(self, descriptor: int) -> None:
        # A second descriptor keeps the number of the inode from being used again.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            self.retried += [
                f"file {descriptor}"
                for failed in self._failed
                if os.path.sameopenfile(failed, descriptor)
            ]
            self._failed.append(os.dup(descriptor))


class Short:
    """An ``os`` that writes and reads fewer bytes than asked for.

    Around the page cache the least is a block, as it is for a kernel.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.cut = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        view = memoryview(data).cast("B")
        return os.pwrite(descriptor, self._shorten(descriptor, view), offset)

    def preadv(self, descriptor: int, buffers: Any, offset: int) -> int:
        view = memoryview(buffers[0]).cast("B")
        return os.preadv(descriptor, [self._shorten(descriptor, view)], offset)

    def _shorten(self, descriptor: int, view: memoryview) -> memoryview:
        most = self._most
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            most = -(-most // PIECE) * PIECE
        self.cut += len(view) > most
        return view[:most]


@dataclass(frozen=True)
class Workload:
    """Something that a fault hits.

    Attributes:
        name: For messages.
        base: What is on disk before.
        before: What a restore brings if the workload failed.
        after: What it brings if the workload succeeded.
        act: The workload itself.
        prepare: What is done before, without a fault.
        keep: Generations to keep.
        root: The checkpoint directory.
        options: For the manager.
        joint: Whether all ranks touch files, so that a fault may hit any of them.
    """

    name: str
    base: Image
    before: Saved | None
    after: Saved | None
    act: Callable[[Training], Any]
    prepare: Callable[[Training], Any] = lambda _: None
    keep: int = 3
    root: str = ROOT
    options: dict[str, Any] = field(default_factory=dict)
    joint: bool = False

    @property
    def family(self) -> type[CheckpointError]:
        """What a fault is told as: to whom saves as SaveError, whatever call it was."""
        return SaveError if "save" in self.name else RestoreError


def save_and_go_on(training: Training, begin: Callable[[int], Any] | None = None) -> None:
    """Save behind the training, which changes everything before it waits for the end."""
    training.move(5)
    pending = (begin or training.manager.save)(5)
    training.move(6)
    pending.wait()
    training.manager.wait()  # also for what is pruned


def save_behind(training: Training) -> None:
    """The same by root alone, which has the lock: only the wait may tell of a fault."""

    def begin(step: int) -> Any:
        try:
            return training.manager.save(step)
        except SaveError as error:
            raise AssertionError(f"told before the wait: {error}") from error

    save_and_go_on(training, begin)


def joint_workloads() -> list[Workload]:
    """Return what only makes sense with several ranks."""
    return [*_shared_out(), *_cut_over_ranks()]


def _cut_over_ranks() -> list[Workload]:
    """Return workloads with tiles, which each rank writes and reads."""
    two, _ = saved_image([1, 2], cut=True)
    small = IO(window_bytes=1 << 13)
    late = {"asynchronous": True, "overlap": True, "writers": "all"}
    ways: list[tuple[str, Saved, Callable[[Training], Any], dict[str, Any]]] = [
        ("save", Saved.of(5), lambda t: t.save(5), {}),
        ("asynchronous save", Saved.of(5), lambda t: t.save(5), {"asynchronous": True}),
        ("overlapped save", Saved.of(5), save_and_go_on, late),
        ("direct save", Saved.of(5), lambda t: t.save(5), {"io": IO(mode="direct")}),
        ("restore", Saved.of(2), Training.restore, {"io": small}),
    ]
    workloads = [
        Workload(
            f"{name} of tiles",
            two,
            Saved.of(2),
            after,
            act,
            keep=2,
            options={"cut": True, **options},
            joint=True,
        )
        for name, after, act, options in ways
    ]
    carrying = Workload(
        "carrying save of tiles",
        two,
        Saved.of(2),
        Saved(5, 2, 5),
        lambda t: t.save(5, only=["plain"]),
        Training.restore,
        options={"cut": True},
        joint=True,
    )
    return [*workloads, carrying]


def _shared_out() -> list[Workload]:
    """Return workloads with files of other ranks than root, of states that all have."""
    two, _ = saved_image([1, 2])
    options = {"writers": "all", "io": IO(readers="all", window_bytes=1 << 13)}
    late = {"asynchronous": True, "overlap": True}
    return [
        Workload(
            f"joint {name}",
            two,
            Saved.of(2),
            after,
            act,
            prepare,
            keep=2,
            options={**options, **more},
            joint=True,
        )
        for name, after, act, prepare, more in [
            ("save", Saved.of(5), lambda t: t.save(5), lambda _: None, {}),
            (
                "asynchronous save",
                Saved.of(5),
                lambda t: t.save(5),
                lambda _: None,
                {"asynchronous": True},
            ),
            ("overlapped save", Saved.of(5), save_and_go_on, lambda _: None, late),
            (
                "save by hosts",
                Saved.of(5),
                lambda t: t.save(5),
                lambda _: None,
                {"writers": "node"},
            ),
            (
                "overlapped save by hosts",
                Saved.of(5),
                save_and_go_on,
                lambda _: None,
                {**late, "writers": "node"},
            ),
            (
                "sharing save",
                Saved(5, 2, 5),
                lambda t: (t.move(5, ["plain"]), t.manager.save(5), t.manager.wait()),
                Training.restore,
                {},
            ),
            ("restore", Saved.of(2), Training.restore, lambda _: None, {}),
        ]
    ]


def workloads() -> list[Workload]:
    image, _ = saved_image([1])
    two, _ = saved_image([1, 2])
    three, _ = saved_image([1, 2, 3])
    damaged = dict(two)
    stream = f"{ROOT}/checkpoint-00000002/plain.bin"
    damaged[stream] = damaged[stream][:-1] + b"\xff"
    left = f"{ROOT}/.partial-00000003-0123456789ab"
    crashed = {**two, left: None, f"{left}/rank-00000.safetensors": b"torn"}
    return [
        Workload(
            "first save", {}, None, Saved.of(5), lambda t: t.save(5), root="made/for/it"
        ),
        Workload(
            "save after a crash", crashed, Saved.of(2), Saved.of(5), lambda t: t.save(5)
        ),
        Workload(
            "save with prune",
            three,
            Saved.of(3),
            Saved.of(5),
            lambda t: t.save(5),
            Training.restore,
            keep=1,
        ),
        Workload(
            "carrying save",
            image,
            Saved.of(1),
            Saved(5, 1, 5),
            lambda t: t.save(5, only=["plain"]),
            Training.restore,
        ),
        Workload(
            "sharing save",
            two,
            Saved.of(2),
            Saved(5, 2, 5),
            lambda t: (t.move(5, ["plain"]), t.manager.save(5), t.manager.wait()),
            Training.restore,
            keep=2,
        ),
        Workload(
            "direct save",
            image,
            Saved.of(1),
            Saved.of(5),
            lambda t: t.save(5),
            options={"io": IO(mode="direct")},
        ),
        Workload(
            "asynchronous save",
            two,
            Saved.of(2),
            Saved.of(5),
            lambda t: t.save(5),
            keep=1,
            options={"asynchronous": True},
        ),
        Workload(
            "overlapped save",
            two,
            Saved.of(3),
            Saved.of(5),
            save_behind,
            lambda t: t.save(3),
            keep=1,
            options={"asynchronous": True, "overlap": True},
        ),
        Workload(
            "restore after a crash", crashed, Saved.of(2), Saved.of(2), Training.restore
        ),
        Workload(
            "save after a fallback",
            damaged,
            Saved.of(1),
            Saved.of(5),
            lambda t: t.save(5),
            Training.restore,
        ),
        Workload("fallback", damaged, Saved.of(1), Saved.of(1), Training.restore),
    ]


@dataclass
class Outcome:
    """What a workload came to under a fault; the same on every rank.

    Attributes:
        fired: Whether the fault did happen.
        error: Class and message of what was raised, None if it succeeded.
        wrong: All that is not as it must be.
        seconds: How long it took.
    """

    fired: bool = False
    error: tuple[str, str] | None = None
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def attempt(
    workload: Workload,
    fault: Fault,
    sandbox: Path,
    comm: Any = None,
    victim: int = 0,
    make: Callable[[Fault, Path], Any] | None = None,
    **options: Any,
) -> Outcome:
    """Run a workload with a fault on one rank; check all that must hold after.

    Collective if ``comm`` is given: files are root's unless the workload is joint,
    everything else is checked on every rank. The fault is made by what ``make`` returns.
    """
    is_root = comm is None or comm.rank == 0
    _lay_out(workload, sandbox, comm)
    is_victim = comm is None or comm.rank == victim
    make = make or (lambda fault, sandbox: Faulty(fault, sandbox=sandbox))
    bystander = in_place_of_os(os if workload.joint else Untouched())
    root = sandbox / workload.root
    options = {**workload.options, **options}
    with Training(root, keep=workload.keep, comm=comm, **options) as training:
        workload.prepare(training)
        seen = numbers_in(root) if is_root else []
        faulty: Any = make(fault, sandbox) if is_victim else None
        place = faulty.in_place() if is_victim else bystander
        outcome = _act(workload, training, place, fault, str(sandbox))
        if is_victim:
            outcome.fired = faulty.fired > 0
            outcome.wrong += [f"fsync again after it failed: {f}" for f in faulty.retried]
            faulty.close_kept()
        expected = workload.before if outcome.error else workload.after
        _go_on(training, expected, outcome)
        # A sweep cannot find what no listing has shown to it.
        if is_root and leftovers(root) and not fault.hides_all:
            outcome.wrong.append(f"left behind: {leftovers(root)}")
        if is_root:
            outcome.wrong += misnumbered(seen, numbers_in(root))
    with Training(root, comm=comm, **options) as training:
        found = training.restore()
        if found != Saved.of(7):
            outcome.wrong.append(f"a new job restored {found} after the next save")
        if is_root and leftovers(root):
            outcome.wrong.append(f"left behind by a new job: {leftovers(root)}")
    return outcome


def misnumbered(seen: Sequence[int], now: Sequence[int]) -> list[str]:
    """Say which numbers are given twice, or after a higher one was seen."""
    late = [
        number for number in now if number not in seen and number < max(seen, default=0)
    ]
    twice = [number for number, times in Counter(now).items() if times > 1]
    return [f"number {n} was given again, {seen} were seen" for n in {*late, *twice}]


def numbers_in(root: Path) -> list[int]:
    """Return the numbers of all generations that are there, or were set aside."""
    names = [
        name.partition("~")[0]
        for place in (root, root / QUARANTINE)
        if place.is_dir()
        for name in os.listdir(place)
    ]
    return [n for name in names if (n := generation_number(name)) is not None]


def count_calls(
    workload: Workload, sandbox: Path, comm: Any = None, **options: Any
) -> Counter[str]:
    """Run a workload without a fault; return how often this rank makes each call.

    Collective if ``comm`` is given. Every run does the same up to its fault, so a fault of
    a later call than these never happens.
    """
    _lay_out(workload, sandbox, comm)
    counting = Counting()
    is_idle = comm is not None and comm.rank > 0 and not workload.joint
    options = {**workload.options, **options}
    root = sandbox / workload.root
    with Training(root, keep=workload.keep, comm=comm, **options) as training:
        workload.prepare(training)
        with in_place_of_os(Untouched() if is_idle else counting):
            workload.act(training)
    return counting.calls


def _lay_out(workload: Workload, sandbox: Path, comm: Any) -> None:
    """Make what is on disk before a workload; no rank returns before that."""
    if comm is None or comm.rank == 0:
        empty(sandbox)
        write_image(workload.base, sandbox)
    if comm is not None:
        comm.Barrier()


class Counting:
    """An ``os`` that counts the calls that may fail."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **kwargs)

        return counted


class Untouched:
    """An ``os`` for ranks that must not touch files at all.

    But for one look: a rank of each other host says what it sees before a fresh start.
    """

    def listdir(self, path: str) -> list[str]:
        caller = sys._getframe(3).f_code.co_name
        if caller != "look":
            raise AssertionError(f"a rank that is not root lists {path}, in {caller}")
        return os.listdir(path)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a rank that is not root calls os.{name}")


def _act(
    workload: Workload, training: Training, place: Any, fault: Fault, sandbox: str
) -> Outcome:
    outcome = Outcome()
    start = time.perf_counter()
    try:
        with place:
            found = workload.act(training)
        restores = workload.act is Training.restore
        if restores and found != workload.after and not fault.hides_all:
            outcome.wrong.append(f"{found} came back under the fault")
    except CheckpointError as error:
        outcome.error = (type(error).__name__, str(error))
        if not isinstance(error, workload.family):
            outcome.wrong.append(f"no {workload.family.__name__}: {error!r}")
        untold = fault.untold(error)
        if untold is not None:
            outcome.wrong.append(untold)
        # The directory that holds the sandbox is fsynced as well.
        if os.path.dirname(sandbox) not in str(error):
            outcome.wrong.append(f"no file is named: {error}")
    outcome.seconds = time.perf_counter() - start
    return outcome


def _go_on(training: Training, expected: Saved | None, outcome: Outcome) -> None:
    """The fault is gone: the right generation is there, and the next save works."""
    wrong = outcome.wrong
    try:
        found = training.restore()
        if found != expected:
            wrong.append(f"restored {found}, expected {expected}")
        training.save(7)
        training.plain.value = b""
        found = training.restore()
        if found != Saved.of(7):
            wrong.append(f"restored {found} after the next save")
    except (CheckpointError, ValueError) as error:
        wrong.append(f"does not go on: {type(error).__name__}: {error}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the library logs out of the output of thousands of faults."""
    logger = logging.getLogger("mpi_ckpt")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass
class Table:
    """How a workload did under many faults.

    Attributes:
        fired: Faults that did happen.
        raised: Those of which an error came.
        calls: The kinds of calls that failed.
        wrong: All that is not as it must be.
    """

    fired: int = 0
    raised: int = 0
    calls: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown = "\n".join(self.wrong[:10])
        return f"{len(self.wrong)} wrong of {self.fired} faults:\n{shown}"


def assert_soon(seconds: Sequence[float]) -> None:
    """Require that no rank waits for its deadline, a minute here, to hear of a fault.

    The promise is ten seconds; once in a run the machine itself may stand still.
    """
    assert max(seconds, default=0) < 50
    assert sum(fault > 10 for fault in seconds) <= 1


def run_table(
    workload: Workload, errnos: Sequence[int] = ERRNOS, *, forever: bool = False
) -> Table:
    """Let every call of every kind fail, with every error, until none fires."""
    table = Table()
    sandbox = scratch()
    try:
        with quiet():
            for call in CALLS:
                last = None
                for code in errnos:
                    first = Fault(call, 1, code, forever)
                    last = _until_none_fires(table, workload, sandbox, first, last)
    finally:
        shutil.rmtree(sandbox)
    return table


def run_lies(
    workload: Workload, kinds: Sequence[str] = LIES, *, forever: bool = False
) -> Table:
    """Let every listing lie, in every way, until none is left."""
    table = Table()
    sandbox = scratch()
    try:
        with quiet():
            for kind in kinds:
                first = Lie("listdir", 1, 0, forever, kind)
                _until_none_fires(table, workload, sandbox, first, None)
    finally:
        shutil.rmtree(sandbox)
    return table


def _until_none_fires(
    table: Table, workload: Workload, sandbox: Path, first: Fault, last: int | None
) -> int:
    """Let each call fail in turn; return which is the last one, unless that is known.

    It does not depend on the error, as every run does the same up to its fault.
    """
    nth = 1
    while last is None or nth <= last:
        fault = replace(first, nth=nth)
        outcome = attempt(workload, fault, sandbox)
        if not outcome.fired:
            break
        table.fired += 1
        COUNTS["faults"] += 1
        table.calls.add(fault.call)
        table.raised += outcome.error is not None
        table.wrong += [f"{workload.name}, {fault}: {line}" for line in outcome.wrong]
        nth += 1
    return nth - 1
