# SPDX-License-Identifier: Apache-2.0
"""Matches an optimizer's parameters with saved ones, by name, else by order. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.states.mismatch import raise_mismatch
from mpi_ckpt.states.wrappers import bare_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mpi_ckpt.leaves.leaf import LeafSpec
    from mpi_ckpt.state import Structure

Shapes = list[list[list[int]]]
Names = list[list["str | None"]]

STATE = "content/state/"
"""Start of the names of leaves of parameters; their index and their key follow."""

OWNED = "owned"
"""Key of a structure without the entries of parameters, which only their owners knew."""

BY_NAME = "by_name"
"""Key of such a structure, if the names of leaves have group and name of a parameter."""

NAMELESS = (
    "parameters that only some ranks have are found by name, and some here have none, or "
    "share it: take a TrainState, which knows their names, or give the optimizer "
    "model.named_parameters()"
)

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
    by_name = BY_NAME in structure
    entries: dict[str, dict[str, Any]] = {}
    for name in leaves:
        owner, key = _owner_and_key(name, by_name=by_name)
        if owner:
            entries.setdefault(owner, {})[key] = {"~": "tensor", "leaf": name}
    plain = {key: value for key, value in structure.items() if key != OWNED}
    if by_name:
        return _numbered(plain, entries)
    numbers = sorted(int(owner) for owner in entries)
    state = {"~": "dict", "items": [[number, entries[str(number)]] for number in numbers]}
    return {**plain, "content": {**plain["content"], "state": state}}


def _owner_and_key(leaf: str, *, by_name: bool) -> tuple[str, str]:
    """Return what a leaf's name says of its parameter, and its key; empty for others."""
    if not leaf.startswith(STATE):
        return "", ""
    rest = leaf[len(STATE) :]
    # Names of parameters may have a slash, keys have none where there are names.
    owner, _, key = rest.rpartition("/") if by_name else rest.partition("/")
    group = owner.partition("/")[0]
    return (owner, key) if group.isdecimal() else ("", "")


def _numbered(
    structure: dict[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a structure whose parameters, those with state, are counted group by group.

    One of another form is returned as it is, and fits no program.
    """
    content = structure["content"]
    saved = content.get("param_groups")
    if not isinstance(saved, list) or not all(isinstance(group, dict) for group in saved):
        return structure
    names: list[list[str]] = [[] for _ in saved]
    for owner in entries:
        group, _, name = owner.partition("/")
        if int(group) >= len(names):
            return structure
        names[int(group)].append(name)
    items: list[list[Any]] = []
    groups: list[dict[str, Any]] = []
    for number, of_group in enumerate(names):
        first = len(items)
        items += [
            [first + at, entries[f"{number}/{name}"]] for at, name in enumerate(of_group)
        ]
        params = list(range(first, len(items)))
        groups.append({**saved[number], "params": params})
    state = {"~": "dict", "items": items}
    return {
        **structure,
        "content": {**content, "state": state, "param_groups": groups},
        "params": [[None] * len(of_group) for of_group in names],
        "names": names,
    }


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
        self._by_name = isinstance(structure, dict) and BY_NAME in structure
        try:
            # None where only the names of leaves say which parameters there are.
            self._shapes: list[list[list[int] | None]] = structure["params"]
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

    def order_for(
        self,
        live: tuple[Shapes, Names],
        tied: Mapping[str, str],
        *,
        is_stage: bool = False,
    ) -> list[int | None]:
        """Return for each saved parameter its place in the program.

        Args:
            live: Shapes and names of the program's parameters.
            tied: Other names of them -> the name in ``live``.
            is_stage: Whether other ranks may have parameters that this one lacks.

        Returns:
            The places; None for a parameter that this rank lacks.

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
        order: list[int | None] = []
        start = 0
        for group, (saved, ours) in enumerate(zip(self._shapes, shapes, strict=False)):
            theirs = [name and tied.get(name, name) for name in self._names[group]]
            places = self._places(group, theirs, names[group], problems, is_stage=is_stage)
            order += [None if place is None else start + place for place in places]
            start += len(ours)
            for i, (place, shape) in enumerate(zip(places, saved, strict=False)):
                if shape is None or place is None or place >= len(ours):
                    continue
                if shape != ours[place]:
                    problems.append(
                        f"group {group}, parameter {self._names[group][i] or i} is saved "
                        f"with shape {shape}, the program has {ours[place]}"
                    )
        raise_mismatch(self._state, problems)
        return order

    def reordered(
        self, order: Sequence[int | None], specs: Sequence[LeafSpec]
    ) -> tuple[Structure, list[LeafSpec | None]]:
        """Return structure and leaves as if saved in the program's order.

        Args:
            order: From `order_for`.
            specs: Specs of the leaves.

        Returns:
            The structure, without parameters that this rank lacks; and the specs, None for
            leaves of such parameters.
        """
        if list(order) == list(range(len(order))) and not self._by_name:
            return self._structure, list(specs)
        places = dict(zip(self._owners(), order, strict=True))
        names = {spec.name: self._rename(spec.name, places) for spec in specs}
        moved: list[list[Any]] = [
            [order[key] if type(key) is int else key, _renamed(entry, names)]
            for key, entry in self._entries
            if type(key) is not int or order[key] is not None
        ]
        content = {
            **self._structure["content"],
            "state": {"~": "dict", "items": moved},
        }
        renamed = [
            None if name is None else replace(spec, name=name)
            for spec, name in zip(specs, names.values(), strict=True)
        ]
        return {**self._structure, "content": content}, renamed

    def _owners(self) -> list[str]:
        """Return for each parameter how the names of its leaves tell it."""
        if not self._by_name:
            return [str(number) for number in range(sum(map(len, self._shapes)))]
        groups = enumerate(self._names)
        return [f"{number}/{name}" for number, group in groups for name in group]

    def _rename(self, leaf: str, places: Mapping[str, int | None]) -> str | None:
        """Return the name of a leaf in the program; None if this rank lacks it."""
        owner, key = _owner_and_key(leaf, by_name=self._by_name)
        if owner not in places:
            return leaf
        place = places[owner]
        return None if place is None else f"{STATE}{place}/{key}"

    def _places(
        self,
        group: int,
        saved: Sequence[str | None],
        live: Sequence[str | None],
        problems: list[str],
        *,
        is_stage: bool,
    ) -> Sequence[int | None]:
        """Return the places of parameters in their group, by name if all have one."""
        named = [*saved, *live]
        if None in named or len({*saved}) < len(saved) or len({*live}) < len(live):
            if is_stage or self._by_name:
                problems.append(f"group {group}: {NAMELESS}")
            if len(saved) == len(live):
                return _partly_named(group, saved, live, problems)
            problems.append(
                f"group {group} is saved with {len(saved)} parameters, the program has "
                f"{len(live)}"
            )
            return list(range(len(saved)))
        place_of = {name: place for place, name in enumerate(live)}
        if is_stage:
            return [place_of.get(name) for name in saved]
        # Parameters without state are not known by name.
        known = set(live if self._by_name else saved)
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
        return [place_of.get(name, len(live)) for name in saved]

    def _not_one(self) -> StateMismatchError:
        return StateMismatchError(f"state {self._state!r} was not saved from an optimizer")


def _partly_named(
    group: int,
    saved: Sequence[str | None],
    live: Sequence[str | None],
    problems: list[str],
) -> list[int]:
    """Return the places of parameters, by the names that both sides have, else by order."""
    counts = Counter(saved), Counter(live)
    common = {name for name in saved if name and all(each[name] == 1 for each in counts)}
    rest = iter([place for place, name in enumerate(live) if name not in common])
    place_of = {name: place for place, name in enumerate(live)}
    places = [place_of[name] if name in common else next(rest) for name in saved]
    problems += [
        f"group {group}: {name} is saved, the program has {live[place]} in its place"
        for name, place in zip(saved, places, strict=True)
        if name and live[place] and name != live[place]
    ]
    return places


def _renamed(node: Any, names: Mapping[str, str | None]) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: _renamed(item, names) for key, item in node.items()}
    if "~" in node and isinstance(node.get("leaf"), str):
        renamed["leaf"] = names.get(node["leaf"], node["leaf"])
    return renamed
