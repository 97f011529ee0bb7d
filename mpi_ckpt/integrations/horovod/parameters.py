# SPDX-License-Identifier: Apache-2.0
"""Broadcasts models and optimizers of any dtype and size, without taking a step.

Digests find equal values, which are not sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpi_ckpt.engine.sync.replicas import sync_states
from mpi_ckpt.errors import StageError, StateMismatchError
from mpi_ckpt.integrations.horovod.attach import attached
from mpi_ckpt.options import Options
from mpi_ckpt.states.nested import NestedState
from mpi_ckpt.states.optimizer import OptimizerState
from mpi_ckpt.states.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from mpi4py import MPI

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.state import Arrival, Structure

__all__ = ["broadcast_optimizer_state", "broadcast_parameters"]


def spec_differences(root: Sequence[LeafSpec], own: Sequence[LeafSpec]) -> list[str]:
    """Return how tensors of the same name differ in form. Not collective. Thread-safe.

    Args:
        root: Specs on root.
        own: Specs on this rank.
    """
    ours = {spec.name: spec for spec in own}
    return [
        f"root has {spec}, this rank {ours[spec.name]}"
        for spec in root
        if spec.name in ours and ours[spec.name] != spec
    ]


def raise_differences(what: str, problems: Sequence[str]) -> None:
    """Raise if there are differences. Not collective. Thread-safe.

    Args:
        what: Name of the broadcast values.
        problems: All differences.

    Raises:
        StateMismatchError: On the calling rank, if the list is not empty.
    """
    if problems:
        ordered = sorted(problems)
        raise StateMismatchError(
            f"its {what} do not fit root's; nothing was changed:\n    "
            + "\n    ".join(ordered),
            problems=ordered,
        )


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[Any],
    root_rank: int = 0,
    *,
    process_set: Any = None,  # noqa: ANN401 (hvd.ProcessSet)
    comm: MPI.Intracomm | None = None,
    deadline_seconds: float = 600.0,
) -> None:
    """Give every rank root's parameters, in place.

    Collective. Main thread only. Accepts all that ``hvd.broadcast_parameters`` does, and
    also generators, every dtype, any size and any layout; only tensors that differ are
    sent.

    Args:
        params: ``model.state_dict()``, ``model.named_parameters()``,
            ``model.parameters()``, or pairs of name and value. The same names, dtypes and
            shapes on every rank. Values that are not tensors or arrays are replaced in a
            dict or a list.
        root_rank: Horovod's number of the rank that has them, among all of its ranks.
        process_set: As for `communicator`.
        comm: As for `communicator`.
        deadline_seconds: How long a wait may take.

    Raises:
        StateMismatchError: On every rank, with the ranks whose parameters are not root's,
            and the differences; nothing was changed.
        StageError: On every rank, if a value has no plain form; nothing was changed.
        CheckpointError: On every rank, for any other failure.
    """
    with attached(root_rank, process_set, comm, deadline_seconds) as private:
        sync_states(private, [_Parameters(params)], Options(), forced=True)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int = 0,
    model: torch.nn.Module | None = None,  # noqa: ARG001 (as Horovod's)
    *,
    process_set: Any = None,  # noqa: ANN401 (hvd.ProcessSet)
    comm: MPI.Intracomm | None = None,
    deadline_seconds: float = 600.0,
) -> None:
    """Give every rank root's optimizer state and hyperparameters.

    Collective. Main thread only. For every optimizer with a state dict, including LBFGS and
    those without any state. It takes no step: no weight changes, no gradient is made.

    Args:
        optimizer: Optimizer of the same kind and over the same parameters on every rank,
            wrapped by Horovod or not.
        root_rank: Horovod's number of the rank that has the state, among all of its ranks.
        model: Not needed; exists because Horovod's broadcast has it.
        process_set: As for `communicator`.
        comm: As for `communicator`.
        deadline_seconds: How long a wait may take.

    Raises:
        StateMismatchError: On every rank, with the ranks whose optimizer is of another kind
            or over other parameters; nothing was changed.
        StageError: On every rank, if an entry has no plain form; nothing was changed.
        CheckpointError: On every rank, for any other failure.
    """
    with attached(root_rank, process_set, comm, deadline_seconds) as private:
        state = _Optimizer("optimizer", optimizer)
        sync_states(private, [state], Options(), forced=True)


class _Parameters(NestedState):
    """Named values, received in place."""

    def __init__(self, params: Mapping[str, Any] | Iterable[Any]) -> None:
        super().__init__("parameters")
        self._given = params
        self._pairs: list[tuple[Any, str, Any]] | None = None

    def nested(self) -> dict[str, Any]:
        if self._pairs is None:  # a generator yields its values only once
            self._pairs = list(_named(self._given))
        values = {name: value for _, name, value in self._pairs}
        if len(values) < len(self._pairs):
            names = [name for _, name, _ in self._pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise StageError(f"several parameters have one name: {', '.join(twice)}")
        return values

    def check(self, structure: Structure, specs: Sequence[LeafSpec]) -> None:
        live = flatten(self.nested())
        problems = spec_differences(specs, [leaf.spec for leaf in live.leaves.values()])
        theirs, ours = structure or {}, live.structure or {}
        problems += [f"root has {name}, this rank has not" for name in theirs.keys() - ours]
        problems += [f"this rank has {name}, root has not" for name in ours.keys() - theirs]
        problems += [
            f"{name} cannot be received into: several elements share one place"
            for name, value in live.values.items()
            if _overlaps(value)
        ]
        if theirs != ours and not isinstance(self._given, (dict, list)):
            problems += [
                f"{name} is no tensor and differs: only a dict or a list can receive it"
                for name in theirs.keys() & ours
                if theirs[name] != ours[name]
            ]
        raise_differences("parameters", problems)

    def accept(self, value: dict[str, Any]) -> None:
        given: Any = self._given
        for key, name, own in self._pairs or ():
            new = value[name]
            if new is own or not isinstance(given, (dict, list)):
                continue
            is_pair = isinstance(given, list) and isinstance(given[key], tuple)
            given[key] = (name, new) if is_pair else new


def _named(params: Any) -> Iterable[tuple[Any, str, Any]]:  # noqa: ANN401
    """Yield key or index, name and value of each parameter."""
    if hasattr(params, "items"):
        yield from ((key, str(key), value) for key, value in params.items())
        return
    for index, param in enumerate(params):
        is_pair = isinstance(param, tuple)
        yield (
            index,
            str(param[0]) if is_pair else str(index),
            param[1] if is_pair else param,
        )


def _overlaps(value: Any) -> bool:  # noqa: ANN401
    strides = getattr(value, "strides", None) or getattr(value, "stride", tuple)()
    return any(
        size > 1 and stride == 0 for size, stride in zip(value.shape, strides, strict=True)
    )


class _Optimizer(OptimizerState):
    """An optimizer that reports differences between ranks in Horovod's terms."""

    def prepare(
        self, structure: Structure, specs: Sequence[LeafSpec], *, strict: bool
    ) -> Arrival:
        problems = []
        # Horovod's wrapper has the name of the wrapped class.
        kind = type(self._optimizer).__name__
        if structure["class"] != kind:
            problems.append(f"root has {structure['class']}, this rank {kind}")
        theirs, (ours, _) = structure["params"], self._described()
        if len(theirs) != len(ours):
            problems.append(f"root has {len(theirs)} groups, this rank {len(ours)}")
        for group, (their_group, own_group) in enumerate(zip(theirs, ours, strict=False)):
            if sorted(their_group) != sorted(own_group):
                problems.append(
                    f"group {group}: root has parameters of shapes {their_group}, "
                    f"this rank {own_group}"
                )
        raise_differences("optimizer", problems)
        return super().prepare(structure, specs, strict=strict)
