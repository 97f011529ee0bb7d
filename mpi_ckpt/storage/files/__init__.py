# SPDX-License-Identifier: Apache-2.0
"""The one module that changes a file system, and what it means when that fails."""
