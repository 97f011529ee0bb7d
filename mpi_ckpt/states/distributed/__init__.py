# SPDX-License-Identifier: Apache-2.0
"""Provides the states of arrays that are cut over the ranks."""
