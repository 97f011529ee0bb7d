# SPDX-License-Identifier: Apache-2.0
"""What the suite asks of another library; each does what it can."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from benchmarks.setting import Arrays, Setting

__all__ = ["Peer", "as_tensors", "is_installed"]

_told: set[str] = set()


def is_installed(setting: Setting, name: str, package: str) -> bool:
    """Return whether a package is there on all ranks; say once if it is not. Collective."""
    # One rank without it must not leave the others alone.
    if all(setting.comm.allgather(find_spec(package) is not None)):
        return True
    if setting.is_root and package not in _told:
        _told.add(package)
        print(f"{name} is skipped: not installed; scripts/peers brings it")
    return False


class Peer:
    """Another library, used as its documents say. Every method is called on all ranks.

    Args:
        setting: Ranks, directory and state.
        path: File or directory of its own, not there yet.

    Attributes:
        name: For the table.
        package: What must be installed.
        can: Which of the methods below it has.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    can: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, setting: Setting, path: Path) -> None:
        self.setting = setting
        self.path = path

    def open(self) -> None:
        """Prepare what it needs; called once."""

    def clear(self) -> None:
        """Remove what it has written."""

        def remove() -> None:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)

        self.setting.on_root(remove)()

    def save(self) -> None:
        """Save the state under the path; durable or not, as the library has it."""
        raise NotImplementedError

    def start(self) -> Callable[[], object]:
        """Begin to save and return as soon as training may go on; returns the wait."""
        raise NotImplementedError

    def load(self) -> None:
        """Bring what was saved into the live state of every rank."""
        raise NotImplementedError

    def to_bytes(self) -> object:
        """Make the bytes of a save, in memory."""
        raise NotImplementedError

    def equalize(self) -> None:
        """Make the state of every rank equal to root's."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live state as tensors over the same memory."""
        return as_tensors(self.setting.state)


def as_tensors(state: Arrays) -> dict[str, torch.Tensor]:
    """Return tensors over the memory of arrays."""
    import torch

    make: Any = torch.from_numpy
    return {name: make(array) for name, array in state.items()}
