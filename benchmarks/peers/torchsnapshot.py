# SPDX-License-Identifier: Apache-2.0
"""torchsnapshot: every rank writes its share of what is said to be replicated."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from benchmarks import names
from benchmarks.peers.base import Peer
from benchmarks.peers.process_group import join_group

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TorchSnapshot"]

_REPLICATED = ["**"]


class TorchSnapshot(Peer):
    """See the module."""

    name = names.TORCHSNAPSHOT
    package = "torchsnapshot"
    can = frozenset({"save", "start", "load"})

    def open(self) -> None:
        """See `Peer`."""
        import torchsnapshot  # noqa: F401 (its import is not to be timed)

        logging.getLogger("torchsnapshot").setLevel(logging.ERROR)
        join_group(self.setting)

    def save(self) -> None:
        """See `Peer`."""
        from torchsnapshot import Snapshot

        Snapshot.take(str(self.path), self._app_state(), replicated=_REPLICATED)

    def start(self) -> Callable[[], object]:
        """See `Peer`."""
        from torchsnapshot import Snapshot

        pending: Any = Snapshot.async_take(
            str(self.path), self._app_state(), replicated=_REPLICATED
        )
        wait: Callable[[], object] = pending.wait
        return wait

    def load(self) -> None:
        """See `Peer`."""
        from torchsnapshot import Snapshot

        Snapshot(str(self.path)).restore(self._app_state())

    def _app_state(self) -> dict[str, Any]:
        from torchsnapshot import StateDict

        return {"adam": StateDict(**self.tensors())}
