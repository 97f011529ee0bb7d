# SPDX-License-Identifier: Apache-2.0
"""The safetensors package: one file by root, mapped and read by every rank."""

from __future__ import annotations

from benchmarks import names
from benchmarks.peers.base import Peer

__all__ = ["Safetensors"]


class Safetensors(Peer):
    """See the module."""

    name = names.SAFETENSORS
    package = "safetensors"
    can = frozenset({"save", "load", "to_bytes"})

    def save(self) -> None:
        """See `Peer`."""
        from safetensors.numpy import save_file

        state, path = self.setting.state, self.path
        self.setting.on_root(lambda: save_file(state, path))()

    def load(self) -> None:
        """See `Peer`."""
        from safetensors.numpy import load_file

        for name, array in load_file(self.path).items():
            self.setting.state[name][...] = array

    def to_bytes(self) -> object:
        """See `Peer`."""
        from safetensors.numpy import save

        return save(self.setting.state)
