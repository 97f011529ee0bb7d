# SPDX-License-Identifier: Apache-2.0
"""Tests beside a real Horovod: ``scripts/horovod_tests``. No part of the default run."""
