# SPDX-License-Identifier: Apache-2.0
"""Runs one sync, one save or one restore. The manager calls them in order."""
