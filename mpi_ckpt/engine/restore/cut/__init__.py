# SPDX-License-Identifier: Apache-2.0
"""Brings cut state, and the parts of ranks, to their places."""
