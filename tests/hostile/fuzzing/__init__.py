# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed, how inputs are changed, and the run of it: see scripts/fuzz."""
