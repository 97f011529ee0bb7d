# SPDX-License-Identifier: Apache-2.0
"""Looks whether a machine and a directory are fit for checkpoints."""
