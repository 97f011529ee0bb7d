# SPDX-License-Identifier: Apache-2.0
"""Implements the commands that show a running job, and the history of a directory."""
