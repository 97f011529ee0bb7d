# SPDX-License-Identifier: Apache-2.0
"""Handles files only: no MPI, no torch, no states. Called by root, or by a reader."""
