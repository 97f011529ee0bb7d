# SPDX-License-Identifier: Apache-2.0
"""torch.save by root, torch.load by every rank: what most training scripts do."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from benchmarks import names
from benchmarks.peers.base import Peer

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.setting import Setting

__all__ = ["TorchSave"]


class TorchSave(Peer):
    """See the module."""

    name = names.TORCH
    package = "torch"
    can = frozenset({"save", "load", "to_bytes"})

    def __init__(self, setting: Setting, path: Path) -> None:
        super().__init__(setting, path)
        self._memory = io.BytesIO()

    def save(self) -> None:
        """See `Peer`."""
        import torch

        self.setting.on_root(lambda: torch.save(self.tensors(), self.path))()

    def load(self) -> None:
        """See `Peer`."""
        import torch

        for name, tensor in torch.load(self.path, weights_only=True).items():
            self.setting.state[name][...] = tensor.numpy()

    def to_bytes(self) -> object:
        """See `Peer`: into memory that is there already, after the first time."""
        import torch

        self._memory.seek(0)
        torch.save(self.tensors(), self._memory)
        return self._memory
