# SPDX-License-Identifier: Apache-2.0
"""How one save runs: staged, written, published, by root or by several ranks."""
