# SPDX-License-Identifier: Apache-2.0
"""Plays a scene: a function that every rank of a job of its own runs.

Each scene has a process of its own, as it matters who starts MPI first. What the function
returns on each rank, or the error it ends with, is what the test gets.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.launch import Outcome, run_job

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Played:
    """What became of a scene.

    Attributes:
        results: What it returned, by rank; a rank that did not get so far has none.
        job: How the job ended.
    """

    results: dict[int, Any]
    job: Outcome

    @property
    def all(self) -> list[Any]:
        """What all ranks returned, in order, once each has."""
        assert self.job.code == 0, self.job.text
        return [self.results[rank] for rank in range(len(self.results))]

    @property
    def common(self) -> Any:
        """What all ranks returned, the same on each."""
        first = self.all[0]
        assert all(result == first for result in self.all), self.all
        return first


def play(
    scene: Callable[..., Any] | str,
    ranks: int = 2,
    *arguments: Any,
    timeout: float = 60,
    **env: str,
) -> Played:
    """Run a function of `scenes` on some ranks, each process anew.

    Args:
        scene: The function; ``module:function`` where its module must not be imported
            by the test, as that would start MPI.
        ranks: How many.
        arguments: Of the function; JSON values.
        timeout: Seconds after which the job is ended.
        env: Variables for the job.
    """
    name = scene if isinstance(scene, str) else f"{scene.__module__}:{scene.__name__}"
    with tempfile.TemporaryDirectory(prefix="mpi_ckpt-scene-") as folder:
        command = ["-m", __name__, name, folder, json.dumps(arguments)]
        job = run_job(ranks, command, timeout=timeout, env=env)
        found = {
            int(path.stem): json.loads(path.read_text())
            for path in Path(folder).glob("*.json")
        }
    missing = [rank for rank in range(ranks) if rank not in found]
    assert not missing or job.code != 0, f"no word of ranks {missing}: {job.text}"
    return Played(found, job)


def error_of(act: Callable[[], Any]) -> str | None:
    """Return class and text of what a call raises; None if it does not."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main(name: str, folder: str, arguments: str) -> None:
    """Run on one rank: play the scene, leave what it returns in a file."""
    import os

    module, _, function = name.partition(":")
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    try:
        result = getattr(import_module(module), function)(*json.loads(arguments))
    except Exception:
        print(f"rank {rank}:", file=sys.stderr)
        traceback.print_exc()
        # The others may wait for this one.
        os._exit(3)
    draft = Path(folder, f"{rank}.draft")
    draft.write_text(json.dumps(result))
    draft.rename(Path(folder, f"{rank}.json"))


if __name__ == "__main__":
    main(*sys.argv[1:])
