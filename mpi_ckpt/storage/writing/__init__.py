# SPDX-License-Identifier: Apache-2.0
"""Writes a generation: files, space, the commit."""
