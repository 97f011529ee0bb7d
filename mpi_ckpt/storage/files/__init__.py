# SPDX-License-Identifier: Apache-2.0
"""Changes the file system, in one module, and explains its failures."""
