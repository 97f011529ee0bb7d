# SPDX-License-Identifier: Apache-2.0
"""Writes the tiles of cut state: which rank writes which, and how."""
