# SPDX-License-Identifier: Apache-2.0
"""Cuts global arrays into boxes, and plans how boxes reach other ranks. Pure."""
