# SPDX-License-Identifier: Apache-2.0
"""Decides which job owns a checkpoint directory: lock, lease, signature."""
