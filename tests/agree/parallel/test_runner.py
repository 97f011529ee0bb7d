# SPDX-License-Identifier: Apache-2.0
"""The runner of these tests itself."""


def test_each_rank_has_a_directory_of_its_own(comm, tmp_path):
    """Sessions that share one clear it away under one another at their end."""
    bases = comm.allgather(str(tmp_path.parent))
    assert len(set(bases)) == comm.size
