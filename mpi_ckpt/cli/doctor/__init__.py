# SPDX-License-Identifier: Apache-2.0
"""Checks whether a machine and a directory are fit for checkpoints."""
