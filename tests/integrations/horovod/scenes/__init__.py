# SPDX-License-Identifier: Apache-2.0
"""What the jobs of these tests do; see `tests.integrations.horovod.playing`."""
