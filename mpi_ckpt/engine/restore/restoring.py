# SPDX-License-Identifier: Apache-2.0
"""Runs one restore in its steps: find, match, transfer, adopt."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeAlias

from mpi_ckpt.comm import Deferred, agree, meet, printed_by
from mpi_ckpt.engine.hosts.root_copies import bring_to_root
from mpi_ckpt.engine.overlaps import differing_overlaps, find_overlaps
from mpi_ckpt.engine.restore.cut import copied_arrivals
from mpi_ckpt.engine.restore.cut.traded_parts import transfer_parts
from mpi_ckpt.engine.restore.cut.trading import trade_leaves
from mpi_ckpt.engine.restore.matching import (
    OVERWRITTEN,
    StateMatch,
    compare_names,
    match_states,
)
from mpi_ckpt.engine.restore.newest import (
    explain_choice,
    go_on_from,
    is_lost,
    open_newest,
    open_on_readers,
    reject,
)
from mpi_ckpt.engine.restore.notices import (
    ResizeWatch,
    make_report,
    warn_of_differences,
    warn_of_restored,
)
from mpi_ckpt.engine.restore.transfer import SavedBytes, transfer_files
from mpi_ckpt.errors import (
    CorruptGenerationError,
    ReadError,
    RestoreError,
    StateMismatchError,
)
from mpi_ckpt.failures import concerning
from mpi_ckpt.leaves.digest import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from mpi_ckpt.choice import Choice
    from mpi_ckpt.engine.overlaps import Overlap
    from mpi_ckpt.engine.registry import Registry
    from mpi_ckpt.engine.restore.cut.copied_tiles import HeldTiles
    from mpi_ckpt.engine.restore.cut.trade_plan import Trades
    from mpi_ckpt.engine.restore.newest import OpenGeneration
    from mpi_ckpt.engine.session import Session
    from mpi_ckpt.reports import PhaseClock, RestoreReport

OnResize: TypeAlias = "Callable[[int, int], object]"
"""Given the number of ranks that saved, and that of now."""

_RESTORED = "the states are restored, except for changes by on_resize() itself"


class Restore:
    """Restores states from memory, else from the newest generation that proves good.

    Or from the generation that the program has asked for, and from no other.

    Collective, as is every method. Main thread only. ``find`` finds the next source to try,
    `quarantine_if_bad` quarantines a generation that turns out bad on the way::

        while restore.find():
            with restore.quarantine_if_bad():
                restore.match()
                restore.transfer()
                restore.adopt()

    Args:
        session: The manager's.
        registry: The manager's.
        only: Names of the states to restore; None for all.
        choice: The program's request; checked when the ranks meet.
        pinned: Number of the generation that other states were restored from; None for
            none.
        clock: Started with the call of the restore.

    Attributes:
        report: The report; None until something was restored.
    """

    def __init__(
        self,
        session: Session,
        registry: Registry,
        only: Collection[str] | None,
        choice: Choice,
        *,
        pinned: int | None,
        clock: PhaseClock,
    ) -> None:
        self._choice = choice
        self._session = session
        self._registry = registry
        self._only = only
        self._pinned = None if only is None else pinned
        self._clock = clock
        self._open = ExitStack()
        self._found: OpenGeneration | None = None
        self._match: StateMatch | None = None
        self._trades: Trades | None = None
        self._held: HeldTiles | None = None
        self._lost = ""
        self._bytes_traded = 0
        self._deferred = Deferred()
        self._resize = ResizeWatch()
        self.report: RestoreReport | None = None

    def find(self) -> bool:
        """Find the next source to try; return whether there is work left to do.

        Raises:
            RegistrationError: On every rank, if names are unknown or differ.
            OptionsError: On every rank, if the request is invalid.
            RestoreError: On every rank, if root finds generations but no good one, or not
                the requested one.
        """
        if self.report is not None:
            return False
        self._deferred = Deferred()
        self._found = self._open.enter_context(
            open_newest(
                self._session,
                self._registry,
                self._only,
                pinned=self._pinned,
                choice=self._choice,
                from_memory=self._only is None and self._choice.is_newest,
            )
        )
        self._held, lost = copied_arrivals.find_tiles(self._session, self._found)
        if lost:
            self._lost = lost
            return self.find()  # among the files
        found, memory = self._found, self._session.memory
        if memory is not None and self._only is None and not (found and found.is_copy):
            # No rank may go back to another rank's older copy from here.
            memory.clear()
        if found is None:
            self._open.close()
            copied_arrivals.refuse_fresh_start(self._lost)
        return found is not None

    @contextmanager
    def quarantine_if_bad(self) -> Iterator[None]:
        """Quarantine a generation that turns out bad within the block, to try the next.

        Raises:
            RestoreError: On every rank, for any other failure, and for a generation that
                must be used.
        """
        session, found = self._session, self._generation
        is_chosen = not self._choice.is_newest
        is_only_one = is_chosen or self._pinned is not None or found.is_copy
        with self._open:
            try:
                yield
            # The ranks agreed on it: every rank is here, with the same error.
            except CorruptGenerationError as problem:
                if is_chosen:
                    raise explain_choice(session, found, problem) from problem
                if is_only_one:
                    raise
                reject(session, found, problem)
            except ReadError as problem:
                if is_only_one or not is_lost(session, found, problem):
                    raise
            finally:
                # Otherwise Python's next garbage collection would scan these.
                self._found = self._match = self._trades = None

    def match(self) -> None:
        """Find a place for every byte.

        Raises:
            StateMismatchError: On every rank, with all mismatches; nothing was changed.
        """
        session, found = self._session, self._generation
        strict, partial = session.options.strict, self._only is not None
        try:
            missing, unexpected = compare_names(
                found.outline, found.states, partial=partial, strict=strict
            )
        except StateMismatchError as error:
            raise printed_by(session.comm, error) from None

        overlaps: list[Overlap] = []

        def match() -> StateMatch:
            states = match_states(found.outline, found.states, strict=strict)
            matched = StateMatch(states, missing, unexpected)
            overlaps.extend(find_overlaps(matched.leaves))
            if found.reader is not None and not matched.has_tiles:
                found.reader.prove_rest()
            if session.comm.is_root:
                self._resize = ResizeWatch.begin(found.outline, matched, session.comm.size)
            return matched

        what = "a copy in memory" if found.is_copy else "a generation"
        doing = f"matching {what} with the program"
        with self._clock.phase("match"):
            met = meet(
                session.comm,
                doing,
                match,
                error=RestoreError,
                digest=lambda _: digest_bytes(repr(overlaps).encode()),
                flag=lambda matched: matched.has_tiles,
            )
            self._match = met.result
            if met.is_flagged:
                args = session, found, met.result, self._held
                self._trades = copied_arrivals.plan_arrivals(*args)
                self._match = met.result.with_unexpected(self._trades.unwanted)
            if overlaps or not met.is_alike:
                self._separate(overlaps, doing)

    def transfer(self) -> None:
        """Put every byte, proven, into its destination.

        Raises:
            CorruptGenerationError: On every rank, if bytes are not those saved.
            ReadError: On every rank, if a reading rank cannot read.
        """
        session, match, deferred = self._session, self._matched, self._deferred
        trades, progress = self._trades, self._clock.progress
        with self._clock.phase("transfer"):
            if self._generation.is_copy:
                args = session, self._generation, match, trades, deferred
                copied_arrivals.bring_copy(*args, progress)
                return
            self._found = open_on_readers(session, self._generation, self._open)
            source = session, self._found
            progress.expect(0 if trades is None else trades.bytes_moved)
            # Parts come first, since bringing them overwrites nothing yet.
            match, nbytes = transfer_parts(*source, match, trades, deferred, progress)
            self._match, self._bytes_traded = match, nbytes
            whole = match if trades is None else match.without(trades.leaves)
            changed = transfer_files(*source, whole, deferred, progress)
            if trades is not None:
                self._bytes_traded += trade_leaves(
                    *source, match, trades, deferred, progress, is_overwritten=changed
                )

    def adopt(self) -> None:
        """Let the states take over the arrived contents, in order; make the report.

        Raises:
            CheckpointError: On every rank, if a state's load fails on any.
        """
        session, matched = self._session, self._matched
        warnings: list[str] = []

        def take_over() -> None:
            self._deferred.raise_failure()
            for pair in matched.states:
                with concerning(f"state {pair.state.name!r}"):
                    pair.arrival.adopt()
            warnings.extend(matched.warnings())

        with self._clock.phase("adopt"):
            agree(
                session.comm,
                "loading the states",
                take_over,
                error=RestoreError,
                safe=OVERWRITTEN,
            )
        self.report = self._make_report()
        warn_of_restored(session, self._generation.outline, warnings)

    def report_resize(self, callback: OnResize | None) -> None:
        """Let the program adapt to another number of ranks than the one that saved.

        Args:
            callback: The program's function; takes the saved and the present number of
                ranks.

        Raises:
            RestoreError: On every rank, if the callback failed on any.
        """
        report = self.report
        if report is None or report.saved_size == report.size:
            return

        def report_change() -> None:
            if callback is not None:
                callback(report.saved_size, report.size)
            self._resize.log(report)

        agree(
            self._session.comm,
            "on_resize()",
            report_change,
            error=RestoreError,
            safe=_RESTORED,
        )

    def _separate(self, overlaps: Sequence[Overlap], doing: str) -> None:
        """Give leaves private memory if their places cannot hold all arriving bytes."""
        found, match, comm = self._generation, self._matched, self._session.comm
        if found.kept is not None:
            extents, leaves = match.extents, {n for one in overlaps for n in one.leaves}
            files = {extents[number].file for number in leaves}
            bring_to_root(self._session, found.kept, files)
        differing = differing_overlaps(
            comm, overlaps, SavedBytes(found, match), doing=doing, error=RestoreError
        )
        self._match = agree(
            comm, doing, lambda: match.without_overlaps(differing), error=RestoreError
        )

    @property
    def _generation(self) -> OpenGeneration:
        assert self._found is not None
        return self._found

    @property
    def _matched(self) -> StateMatch:
        assert self._match is not None
        return self._match

    def _make_report(self) -> RestoreReport:
        session, found, chosen = self._session, self._generation, self._choice
        report = make_report(
            session, found, self._matched, self._clock.seconds(), self._bytes_traded
        )
        if self._pinned is None or not chosen.is_newest:
            go_on_from(session, None if chosen.is_newest else found.outline)
        if session.hosts is not None:
            kept = None if found.kept is None else found.kept.origin
            session.hosts.note_restored(report.generation, kept)
        if not found.is_copy:
            session.note("restored", report.step)
            warn_of_differences(session, report)
        return report
