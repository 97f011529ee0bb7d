# SPDX-License-Identifier: Apache-2.0
"""Changes of inputs that know JSON: most of what plain flips make is no JSON at all."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

VALUES: list[Any] = [
    *(0, 1, -1, 2, 7, 8, 9, 16, 24, 4096, 2**31, 2**53, 2**60, 2**60 + 1, 2**63, 2**64),
    *(
        10**400,
        0.5,
        1e308,
        -0.0,
        True,
        False,
        None,
        "",
        "a",
        "..",
        "../x",
        "/x",
        "\0",
        "\n",
    ),
    *("x" * 300, "O", "F64", "U8", "C128", "numpy:<U10", "numpy:<M8[ns]", "00" * 16, "zz"),
    *([], {}, [[]], [0], [2, 3], [0, 2**60, 2**60], {"~": "tuple", "items": []}, "\ud800"),
]


def mutate_json(data: bytes, rng: random.Random, *, closing: bytes) -> bytes | None:
    """Change some values of the JSON that data is, with its last bytes left away.

    Returns:
        None if it is no JSON, or too deep.
    """
    with suppress(ValueError, RecursionError):
        document = json.loads(data + closing)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            document = _changed(document, rng)
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=rng.random() < 0.2)
        encoded = text.encode(errors="replace")
        return encoded[: len(encoded) - len(closing)]
    return None


def _changed(document: Any, rng: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return copy.deepcopy(rng.choice(VALUES))
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1:
        other, taken = rng.choice(places)
        # A copy: a node within itself would have no end.
        node[key] = copy.deepcopy(other[taken])
    elif action == 2 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice((-16, -8, -1, 1, 8, 16))
    elif action == 3 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif action == 4 and isinstance(node, dict):
        node[str(rng.choice(VALUES))[:20]] = node.pop(key)
    else:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def _places(document: Any) -> Any:
    stack = [document]
    while stack:
        node = stack.pop()
        if isinstance(node, (dict, list)):
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                yield node, key
                stack.append(node[key])


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or put in some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[at : at + rng.randrange(1, 20)]
        elif action == 2:
            changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        else:
            changed[at:at] = bytes([rng.choice(b'{}[]",:\\\0\x80\xff0-9eE. ')])
    return bytes(changed)


def mutate(target: str, data: bytes, rng: random.Random) -> bytes:
    """Change an input of a target: mostly as JSON, sometimes as bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    if target == "directory":
        from tests.hostile.fuzzing.targets import join, split

        head, shard, stream = split(data)
        part = rng.randrange(6)
        if part == 0:
            shard = mutate_bytes(shard, rng)[:60_000]
        elif part == 1:
            stream = mutate_bytes(stream, rng)[:60_000]
        else:
            head = mutate_json(head, rng, closing=b"}") or mutate_bytes(head, rng)
        return join(head, shard, stream) + (b" " if rng.random() < 0.3 else b"")
    closing = b"}" if target == "manifest" else b""
    return mutate_json(data, rng, closing=closing) or mutate_bytes(data, rng)
