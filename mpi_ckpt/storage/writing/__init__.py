# SPDX-License-Identifier: Apache-2.0
"""A generation on its way: files, space, the commit."""
