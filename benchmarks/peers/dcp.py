# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint: every rank writes its share of the replicated state."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from benchmarks import names
from benchmarks.peers.base import Peer
from benchmarks.peers.process_group import join_group

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DistributedCheckpoint"]


class DistributedCheckpoint(Peer):
    """See the module."""

    name = names.DCP
    package = "torch"
    can = frozenset({"save", "start", "load"})

    def open(self) -> None:
        """See `Peer`."""
        # It warns of a plan cache that does not matter here.
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
        join_group(self.setting)

    def save(self) -> None:
        """See `Peer`."""
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self.tensors(), checkpoint_id=self.path)

    def start(self) -> Callable[[], object]:
        """See `Peer`."""
        from torch.distributed.checkpoint.state_dict_saver import async_save

        pending: Any = async_save(self.tensors(), checkpoint_id=self.path)
        wait: Callable[[], object] = pending.result
        return wait

    def load(self) -> None:
        """See `Peer`."""
        from torch.distributed.checkpoint.state_dict_loader import load

        load(self.tensors(), checkpoint_id=self.path)
