# SPDX-License-Identifier: Apache-2.0
"""adaptdl.checkpoint: root's torch.save into its folder and a rename, as its users do."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, BinaryIO

from benchmarks import names
from benchmarks.peers.base import Peer

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.setting import Setting

__all__ = ["Adaptdl"]


class Adaptdl(Peer):
    """See the module."""

    name = names.ADAPTDL
    package = "adaptdl"
    can = frozenset({"save", "load"})

    _count = 0

    def __init__(self, setting: Setting, path: Path) -> None:
        super().__init__(setting, path)
        self._state: Any = None

    def open(self) -> None:
        """See `Peer`."""
        os.environ["ADAPTDL_REPLICA_RANK"] = str(self.setting.comm.rank)
        os.environ["ADAPTDL_NUM_REPLICAS"] = str(self.setting.comm.size)
        os.environ["ADAPTDL_NUM_RESTARTS"] = "0"
        from adaptdl import checkpoint

        logging.getLogger("adaptdl.checkpoint").setLevel(logging.ERROR)
        peer = self

        class Everything(checkpoint.State):  # type: ignore[misc]
            def save(self, fileobj: BinaryIO) -> None:
                import torch

                torch.save(peer.tensors(), fileobj)

            def load(self, fileobj: BinaryIO) -> None:
                import torch

                for name, tensor in torch.load(fileobj, weights_only=True).items():
                    peer.setting.state[name][...] = tensor.numpy()

        Adaptdl._count += 1
        self._state = Everything(f"adam-{Adaptdl._count}")
        self.setting.stack.callback(self._forget)

    def clear(self) -> None:
        """See `Peer`: it wants its folder to be there."""
        super().clear()
        self.setting.on_root(self.path.mkdir)()

    def save(self) -> None:
        """See `Peer`."""
        from adaptdl import checkpoint

        os.environ["ADAPTDL_CHECKPOINT_PATH"] = str(self.path)
        checkpoint.save_all_states()
        # It does not wait for root by itself.
        self.setting.comm.Barrier()

    def load(self) -> None:
        """See `Peer`."""
        from adaptdl import checkpoint

        os.environ["ADAPTDL_CHECKPOINT_PATH"] = str(self.path)
        checkpoint.load_state(self._state)

    def _forget(self) -> None:
        # It has no way to unregister a state, and would save it again in the next case.
        from adaptdl import checkpoint

        name = checkpoint._STATES_TO_NAMES.pop(self._state)  # noqa: SLF001
        del checkpoint._NAMES_TO_STATES[name]  # noqa: SLF001
