# SPDX-License-Identifier: Apache-2.0
"""Makes replicas equal, and captures their contents for a save."""
