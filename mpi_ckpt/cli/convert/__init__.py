# SPDX-License-Identifier: Apache-2.0
"""Commands that take states to files of other formats, and from them."""
