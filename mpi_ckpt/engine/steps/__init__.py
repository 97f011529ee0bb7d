# SPDX-License-Identifier: Apache-2.0
"""Handles a training step: votes, the next save, a request to stop."""
