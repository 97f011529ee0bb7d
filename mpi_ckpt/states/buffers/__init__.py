# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the memory of arrays and tensors."""
