# SPDX-License-Identifier: Apache-2.0
import pytest

from tests.local.scene import Scene


@pytest.fixture
def scene(comm, on_hosts, shared_path):
    """A training of which each rank is on a host of its own."""
    return Scene(comm, on_hosts, shared_path)
