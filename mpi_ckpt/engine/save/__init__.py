# SPDX-License-Identifier: Apache-2.0
"""Runs one save: stage, write, publish, by root or by several ranks."""
