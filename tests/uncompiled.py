# SPDX-License-Identifier: Apache-2.0
"""Lets torch's optimizers work without torch's compiler, until something asks for it.

Making an optimizer imports ``torch._dynamo`` and with it sympy, only to say that nothing is
to be compiled: 1.3 seconds of each process, nearly as much as all of torch.
"""

from __future__ import annotations

import importlib
import sys
import types

NAME = "torch._dynamo"


class _Later(types.ModuleType):
    """Stands for it; for anything but two of its functions the real one is loaded."""

    @staticmethod
    def disable(function, *_, **__):
        return function

    @staticmethod
    def graph_break():
        pass

    def __getattr__(self, name):
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)  # as `inspect` asks of every module
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME]
        return getattr(importlib.import_module(NAME), name)


def leave_out_compiler() -> None:
    """Have ``torch._dynamo`` loaded when it is needed, not when it is named."""
    sys.modules.setdefault(NAME, _Later(NAME))
