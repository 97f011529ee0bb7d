# SPDX-License-Identifier: Apache-2.0
"""How one restore runs: found, matched, transferred, adopted."""
