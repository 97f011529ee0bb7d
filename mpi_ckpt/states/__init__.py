# SPDX-License-Identifier: Apache-2.0
"""Provides the states of this library.

No state opens a file. Only states that are given torch objects import torch.
"""
