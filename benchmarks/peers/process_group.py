# SPDX-License-Identifier: Apache-2.0
"""A process group of torch among the ranks of an MPI job."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.setting import Setting

__all__ = ["join_group"]


def join_group(setting: Setting) -> None:
    """Join torch's default group over gloo, left after the case. Collective.

    Over loopback where all ranks share one host, else over what root's name resolves to.
    """
    import torch.distributed

    if torch.distributed.is_initialized():
        return
    comm = setting.comm
    nodes = comm.allgather(socket.gethostname())
    if len(set(nodes)) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        address = "127.0.0.1"
    else:
        address = nodes[0]
    with socket.socket() as probe:
        # Free now, on root; nobody else is likely to take it before root does.
        probe.bind(("", 0))
        port = comm.bcast(probe.getsockname()[1])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=comm.rank,
        world_size=comm.size,
    )
    setting.stack.callback(torch.distributed.destroy_process_group)
