# SPDX-License-Identifier: Apache-2.0
"""Implements the commands that inspect and maintain a checkpoint directory."""
