# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: ``mpirun -n N python -m benchmarks CASE...``; see README.md."""
