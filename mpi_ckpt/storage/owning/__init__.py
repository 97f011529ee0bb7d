# SPDX-License-Identifier: Apache-2.0
"""Who owns a checkpoint directory: lock, lease, signature."""
