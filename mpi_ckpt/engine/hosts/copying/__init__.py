# SPDX-License-Identifier: Apache-2.0
"""Copies local generations to the checkpoint directory."""
