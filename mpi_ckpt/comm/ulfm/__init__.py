# SPDX-License-Identifier: Apache-2.0
"""Recovery in place: what only a ULFM of Open MPI 5 can do, and what it takes to use it."""
