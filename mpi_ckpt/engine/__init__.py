# SPDX-License-Identifier: Apache-2.0
"""How one sync, one save, one restore runs. The manager puts them in order."""
