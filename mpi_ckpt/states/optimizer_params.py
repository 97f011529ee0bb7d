# SPDX-License-Identifier: Apache-2.0
"""Matches an optimizer's parameters with saved ones, by name, else by order. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.wrappers import bare_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpi_ckpt.leaf import LeafSpec
    from mpi_ckpt.state import Structure

Shapes = list[list[list[int]]]
Names = list[list["str | None"]]

STATE = "content/state/"
"""Start of the names of leaves of parameters; their index and their key follow."""

OWNED = "owned"
"""Key of a structure without the entries of parameters, which only their owners knew."""

_OWNED_KEYS = {OWNED, "class", "content", "params", "names"}


def describe_params(
    groups: Sequence[Mapping[str, Any]], known: Mapping[int, str]
) -> tuple[Shapes, Names]:
    """Return the shapes and the names of an optimizer's parameters, group by group.

    Not collective.

    Args:
        groups: The optimizer's parameter groups.
        known: id of a parameter -> its name, if the module is known.
    """
    shapes: Shapes = [[list(p.shape) for p in group["params"]] for group in groups]
    names: Names = []
    for group in groups:
        given = group.get("param_names") or [None] * len(group["params"])
        names.append(
            [
                known.get(id(p)) or (name and bare_name(name))
                for p, name in zip(group["params"], given, strict=False)
            ]
        )
    return shapes, names


def with_entries(structure: Structure, leaves: Iterable[str]) -> Structure:
    """Return a structure with the entries of parameters, made from the names of leaves.

    Not collective.

    Args:
        structure: Any saved structure; another than one with `OWNED` is returned as it is.
        leaves: Names of the saved leaves.
    """
    # A value of the program may have a key of that name.
    if not isinstance(structure, dict) or not set(structure) >= _OWNED_KEYS:
        return structure
    if not isinstance(structure["content"], dict):
        return structure
    entries: dict[int, dict[str, Any]] = {}
    for name in leaves:
        index, _, key = name.removeprefix(STATE).partition("/")
        if name.startswith(STATE) and index.isdecimal():
            entries.setdefault(int(index), {})[key] = {"~": "tensor", "leaf": name}
    plain = {key: value for key, value in structure.items() if key != OWNED}
    state = {"~": "dict", "items": [[i, entries[i]] for i in sorted(entries)]}
    return {**plain, "content": {**plain["content"], "state": state}}


def entries_of(structure: Structure) -> list[list[Any]]:
    """Return index and entry of each parameter that has state. Not collective.

    Args:
        structure: The structure of an optimizer.
    """
    entries = structure["content"]["state"]
    if "~" in entries:
        return list(entries["items"])
    return [[key, entry] for key, entry in entries.items()]


class SavedParams:
    """The parameters that an optimizer was saved with.

    Not collective.

    Args:
        state: Name of the state, for messages.
        structure: Its saved JSON values.

    Raises:
        StateMismatchError: On the calling rank, if it was not saved from an optimizer.
    """

    def __init__(self, state: str, structure: Structure) -> None:
        self._state = state
        self._structure = structure
        try:
            self._shapes: Shapes = structure["params"]
            names: Names = structure.get("names") or [[None] * len(g) for g in self._shapes]
            self._names = names
            self._entries = entries_of(structure)
            count = sum(map(len, self._shapes))
            fits = list(map(len, names)) == list(map(len, self._shapes)) and all(
                len(entry) == 2 and not (type(entry[0]) is int and entry[0] >= count)
                for entry in self._entries
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise self._not_one() from error
        if not fits:
            raise self._not_one()

    def require_class(self, name: str) -> None:
        """Require the optimizer's class: another class would use the state differently.

        Raises:
            StateMismatchError: On the calling rank, if it is another.
        """
        saved = self._structure.get("class")
        if saved is not None and saved != name:
            problem = (
                f"it was saved from the optimizer {saved}, the program has {name}: to go "
                "on with another one, restore the module alone first"
            )
            raise_mismatch(self._state, [problem])

    def order_for(self, live: tuple[Shapes, Names]) -> list[int]:
        """Return for each saved parameter its place in the program.

        Args:
            live: Shapes and names of the program's parameters.

        Raises:
            StateMismatchError: On the calling rank, with all mismatches.
        """
        shapes, names = live
        problems: list[str] = []
        if len(self._shapes) != len(shapes):
            problems.append(
                f"{len(self._shapes)} parameter groups are saved, the program has "
                f"{len(shapes)}"
            )
        order: list[int] = []
        start = 0
        for group, (saved, ours) in enumerate(zip(self._shapes, shapes, strict=False)):
            places = self._places(group, names[group], len(ours), problems)
            order += [start + place for place in places]
            start += len(ours)
            for i, (place, shape) in enumerate(zip(places, saved, strict=False)):
                if place < len(ours) and shape != ours[place]:
                    problems.append(
                        f"group {group}, parameter {self._names[group][i] or i} is saved "
                        f"with shape {shape}, the program has {ours[place]}"
                    )
        raise_mismatch(self._state, problems)
        return order

    def reordered(
        self, order: Sequence[int], specs: Sequence[LeafSpec]
    ) -> tuple[Structure, list[LeafSpec]]:
        """Return structure and leaves as if saved in the program's order.

        Args:
            order: From `order_for`.
            specs: Specs of the leaves.
        """
        if list(order) == list(range(len(order))):
            return self._structure, list(specs)
        places = {str(old): str(new) for old, new in enumerate(order)}
        moved: list[list[Any]] = [
            [order[key] if type(key) is int else key, _renamed(entry, places)]
            for key, entry in self._entries
        ]
        content = {
            **self._structure["content"],
            "state": {"~": "dict", "items": moved},
        }
        renamed = [replace(spec, name=_rename(spec.name, places)) for spec in specs]
        return {**self._structure, "content": content}, renamed

    def _places(
        self, group: int, live: Sequence[str | None], count: int, problems: list[str]
    ) -> list[int]:
        """Return the places of parameters in their group, by name if all have one."""
        saved = self._names[group]
        named = [*saved, *live]
        if None in named or len({*saved}) < len(saved) or len({*live}) < len(live):
            if len(saved) != count:
                problems.append(
                    f"group {group} is saved with {len(saved)} parameters, the program "
                    f"has {count}"
                )
            return list(range(len(saved)))
        place_of = {name: place for place, name in enumerate(live)}
        known = set(saved)
        problems += [
            f"group {group}: {name} is saved, the program has no such parameter there"
            for name in saved
            if name not in place_of
        ]
        problems += [
            f"group {group}: {name} is in the program, not in the checkpoint"
            for name in live
            if name not in known
        ]
        return [place_of.get(name, count) for name in saved]

    def _not_one(self) -> StateMismatchError:
        return StateMismatchError(f"state {self._state!r} was not saved from an optimizer")


def _renamed(node: Any, places: Mapping[str, str]) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(node, list):
        return [_renamed(item, places) for item in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: _renamed(item, places) for key, item in node.items()}
    if "~" in node and isinstance(node.get("leaf"), str):
        renamed["leaf"] = _rename(node["leaf"], places)
    return renamed


def _rename(leaf: str, places: Mapping[str, str]) -> str:
    if not leaf.startswith(STATE):
        return leaf
    index, slash, rest = leaf[len(STATE) :].partition("/")
    return f"{STATE}{places.get(index, index)}{slash}{rest}"
