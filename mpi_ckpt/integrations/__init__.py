# SPDX-License-Identifier: Apache-2.0
"""Connects to other training frameworks: one package each, independent of one another."""
