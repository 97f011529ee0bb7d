# SPDX-License-Identifier: Apache-2.0
"""Other libraries for the same job, in the same run; scripts/peers brings them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks import ceilings, names
from benchmarks.harness import Contender
from benchmarks.peers.adaptdl import Adaptdl
from benchmarks.peers.base import is_installed
from benchmarks.peers.dcp import DistributedCheckpoint
from benchmarks.peers.horovod import Horovod
from benchmarks.peers.safetensors import Safetensors
from benchmarks.peers.torch_save import TorchSave
from benchmarks.peers.torchsnapshot import TorchSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.peers.base import Peer
    from benchmarks.setting import Setting

__all__ = [
    "available",
    "find_horovod",
    "load_contenders",
    "object_contenders",
    "save_contenders",
    "start_contenders",
    "sync_contenders",
    "to_bytes_contenders",
]

PEERS: tuple[type[Peer], ...] = (
    TorchSave,
    Safetensors,
    DistributedCheckpoint,
    TorchSnapshot,
    Adaptdl,
    Horovod,
)


def available(setting: Setting, ability: str) -> list[Peer]:
    """Return the peers that can do something; say once which are not installed.

    Collective. Each has a path of its own in the directory of the case.
    """
    found = []
    for kind in PEERS:
        if ability not in kind.can:
            continue
        if not is_installed(setting, kind.name, kind.package):
            continue
        peer = kind(setting, setting.directory / f"{kind.package}-{kind.__name__}")
        peer.open()
        found.append(peer)
    return found


def save_contenders(setting: Setting, *, both: bool = True) -> list[Contender]:
    """Saves by peers, made durable; with ``both`` also as they are."""
    contenders = []
    for peer in available(setting, "save"):
        # What is not durable is removed before the kernel writes it back: the next
        # contender would pay for that.
        clear = _clearing(peer)
        contenders.append(
            Contender(names.durable(peer.name), _durable_save(peer), peer.clear, clear)
        )
        if both:
            contenders.append(
                Contender(peer.name, peer.save, peer.clear, clear, durable=False)
            )
    return contenders


def _durable_save(peer: Peer) -> Callable[[], None]:
    def save() -> None:
        peer.save()
        # Root's return does not say that the others have written.
        peer.setting.comm.Barrier()
        peer.setting.on_root(partial(ceilings.fsync_tree, peer.path))()

    return save


def _clearing(peer: Peer) -> Callable[[object], None]:
    return lambda _: peer.clear()


def _waiting(peer: Peer) -> Callable[[Callable[[], object]], None]:
    def finish(wait: Callable[[], object]) -> None:
        wait()
        peer.setting.comm.Barrier()
        peer.clear()

    return finish


def start_contenders(setting: Setting) -> list[Contender]:
    """Asynchronous saves by peers: until training may go on."""
    contenders = []
    for peer in available(setting, "start"):
        name, finish = f"{peer.name}, asynchronous", _waiting(peer)
        contenders.append(Contender(name, peer.start, peer.clear, finish, durable=False))
    return contenders


def load_contenders(setting: Setting) -> list[Contender]:
    """Restores by peers of what they saved, with a cold cache."""
    contenders = []
    for peer in available(setting, "load"):
        peer.clear()
        _durable_save(peer)()
        name = names.TORCH_LOAD if peer.name == names.TORCH else names.load(peer.name)
        contenders.append(Contender(name, peer.load, setting.cold))
    return contenders


def to_bytes_contenders(setting: Setting) -> list[Contender]:
    """The making of bytes by peers, on root."""
    return [
        Contender(f"{peer.name} to memory", setting.on_root(peer.to_bytes), durable=False)
        for peer in available(setting, "to_bytes")
    ]


def find_horovod(setting: Setting) -> Horovod | None:
    """Return Horovod if it is there."""
    found = available(setting, "broadcast")
    return found[0] if found and isinstance(found[0], Horovod) else None


def sync_contenders(
    setting: Setting, before: Callable[[], object] = lambda: None
) -> list[Contender]:
    """Replicas made equal by peers."""
    peer = find_horovod(setting)
    if peer is None:
        return []

    def begin() -> None:
        before()
        peer.begin()

    return [Contender(names.HOROVOD_SYNC, peer.equalize, begin, lambda _: peer.end())]


def object_contenders(setting: Setting, value: object) -> list[Contender]:
    """A value broadcast as one object by peers."""
    peer = find_horovod(setting)
    if peer is None:
        return []
    act = partial(peer.broadcast_object, value)
    return [Contender(names.HOROVOD_OBJECT, act, peer.begin, lambda _: peer.end())]
