# SPDX-License-Identifier: Apache-2.0
"""Converts states to files of other formats, and from them."""
