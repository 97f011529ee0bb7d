# SPDX-License-Identifier: Apache-2.0
"""The directory of one host in a local level, and the lineage of the runs that saved."""
