# SPDX-License-Identifier: Apache-2.0
"""Bytes of a generation, read in long runs and proven."""
