# SPDX-License-Identifier: Apache-2.0
"""Defines leaves: their bytes, types, digests, and where they arrive. Pure, or nearly."""
