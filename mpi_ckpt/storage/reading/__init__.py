# SPDX-License-Identifier: Apache-2.0
"""Reads the bytes of a generation in long runs, and proves them."""
