# SPDX-License-Identifier: Apache-2.0
"""Beside other people's training loops. One package each; none knows of another."""
