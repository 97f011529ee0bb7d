# SPDX-License-Identifier: Apache-2.0
"""Writes and loads files of torch.save; the only command line module that imports torch."""

from __future__ import annotations

import io
import re
import zipfile
from typing import TYPE_CHECKING, Any

from mpi_ckpt.cli.command import CommandError
from mpi_ckpt.decomposition.boxes import Box
from mpi_ckpt.errors import StateMismatchError
from mpi_ckpt.states.rebuilding import rebuild
from mpi_ckpt.storage import filesystem
from mpi_ckpt.storage.format.manifest import STREAM
from mpi_ckpt.storage.reading.assembly import read_box, stored_array
from mpi_ckpt.storage.reading.proving import proven_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from _typeshed import ReadableBuffer

    from mpi_ckpt.storage.format.manifest import StoredState
    from mpi_ckpt.storage.reading.reader import GenerationReader

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# The first version without either of the known ways around weights_only.
_SAFE_TORCH = (2, 10)


def write_file(
    descriptor: int,
    reader: GenerationReader,
    states: Sequence[StoredState],
    *,
    alone: bool,
    done: Callable[[int], None],
) -> None:
    """Write states as torch.save does; holds all of them in memory at once.

    Args:
        descriptor: Descriptor of the empty file.
        reader: The generation.
        states: The states to write.
        alone: Whether the file holds the one state itself, not a dict of states.
        done: Called with the number of bytes read.

    Raises:
        CommandError: If torch is missing, or has no such dtype.
        RestoreError: If the generation is damaged or cannot be read.
    """
    torch = _torch()
    values = {state.name: _value(reader, state, done) for state in states}
    with io.BufferedWriter(_Sink(descriptor), 1 << 20) as sink:
        torch.save(next(iter(values.values())) if alone else values, sink)


def load_file(path: Path) -> Any:  # noqa: ANN401 (any nested value)
    """Load a file of torch.save, tensors and plain values only: runs no code.

    Raises:
        CommandError: If torch is missing or too old to do that safely, or the file holds
            other values or is damaged.
    """
    torch = _torch()
    _refuse_unsafe(torch.__version__)
    start = filesystem.read_start(path, 4)
    zipped = start == _ZIP
    try:
        if zipped:
            _refuse_compressed(path)
        elif start[:1] != _PICKLE:  # tar archives too, which torch unpacks
            raise ValueError("it is no file of torch.save")
        # Mapped, so that memory holds only the needed parts.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = (
            f"it holds a {unsafe[1]}, which only unpickling can make; save tensors and "
            "plain values (state_dict()) instead"
            if unsafe
            else (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        raise CommandError(f"{path} cannot be loaded: {why}", kind="damaged") from error


def _refuse_unsafe(version: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < _SAFE_TORCH:
        least = ".".join(map(str, _SAFE_TORCH))
        raise CommandError(
            f"a file can make torch {version} run code, even with weights_only "
            f"(CVE-2025-32434, CVE-2026-24747): upgrade to {least}, or convert the file to "
            "safetensors on a machine where you trust it",
            kind="missing",
        )


def _refuse_compressed(path: Path) -> None:
    # Torch never compresses. If mapped, compressed bytes would count as the tensor's; if
    # unpacked, a small file could fill the memory.
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")


def is_module(value: Any) -> bool:  # noqa: ANN401 (any nested value)
    """Return whether a loaded value is like a module's state dict."""
    torch = _torch()
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in value.items()
        )
    )


def module_form(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate tied tensors of a state dict from the first of each group.

    Returns:
        The structure for ``ModuleState``, and the tensors to save.
    """
    first: dict[tuple[Any, ...], str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        form = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        source = first.setdefault(form, name) if tensor.numel() else name
        if source != name:
            ties[name] = source
    kept = {name: tensor for name, tensor in tensors.items() if name not in ties}
    return {"ties": ties, "extra": {}}, kept


def _value(
    reader: GenerationReader, state: StoredState, done: Callable[[int], None]
) -> Any:  # noqa: ANN401
    from mpi_ckpt.states.tensors import empty_tensor, tensor_leaf

    # A stream becomes a tensor of bytes: weights-only loads refuse an empty `bytes`.
    specs = [leaf.spec for leaf in state.leaves]
    specs += [leaf.spec for leaf in state.cut]
    targets: list[memoryview] = []
    values: dict[str, Any] = {}
    for spec in specs:
        try:
            values[spec.name] = empty_tensor(spec)
        except StateMismatchError as error:
            raise CommandError(f"{error}: export it as safetensors instead") from error
        view = tensor_leaf(spec.name, values[spec.name]).buffer.view()
        assert view is not None
        targets.append(view)
    for block, data in proven_blocks(reader, state.leaves):
        targets[block.leaf][block.start : block.end] = data
        done(len(data))
    for leaf, target in zip(state.cut, targets[len(state.leaves) :], strict=True):
        array = stored_array(reader, state.name, leaf)
        read_box(reader, array, Box.whole(leaf.spec.shape), target)
        done(len(target))
    return values[STREAM] if state.is_stream else rebuild(state.structure, values)


class _Sink(io.RawIOBase):
    """Appends to a descriptor through the seam."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._offset = 0

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data).cast("B")
        filesystem.write_all(self._descriptor, view, self._offset)
        self._offset += len(view)
        return len(view)


def _torch() -> Any:  # noqa: ANN401 (a module)
    try:
        import torch
    except ImportError as error:
        raise CommandError(
            "files of torch.save need torch: pip install 'mpi_ckpt[torch]', or use "
            "--format safetensors",
            kind="missing",
        ) from error
    return torch
