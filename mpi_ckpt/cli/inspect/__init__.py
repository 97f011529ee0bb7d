# SPDX-License-Identifier: Apache-2.0
"""Commands that look at a checkpoint directory, and look after it: ls to rollback."""
