# SPDX-License-Identifier: Apache-2.0
"""What torch tests itself with: all of its optimizers and modules, in all configurations.

Raises ImportError where this torch has no such list, or what it needs is not there.
"""

from __future__ import annotations

import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _frozen = torch.backends.flags_frozen()
    from torch.testing._internal import common_modules, common_optimizers

    # The import freezes torch.backends for the whole process: not for the other tests.
    torch.backends.__allow_nonbracketed_mutation_flag = not _frozen

MODULES = common_modules.module_db
OPTIMIZERS = common_optimizers.optim_db
configurations = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
