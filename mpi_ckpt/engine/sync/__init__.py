# SPDX-License-Identifier: Apache-2.0
"""How replicas are made equal, and what a save takes of them."""
