# SPDX-License-Identifier: Apache-2.0
"""Files only: no MPI, no torch, no states. Called by the root rank, or by a reader."""
