# SPDX-License-Identifier: Apache-2.0
"""Provides the states of which each rank has a value of its own."""
