# SPDX-License-Identifier: Apache-2.0
"""Jobs that tests start under mpirun."""
