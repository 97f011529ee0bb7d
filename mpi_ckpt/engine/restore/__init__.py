# SPDX-License-Identifier: Apache-2.0
"""Runs one restore: find, match, transfer, adopt."""
