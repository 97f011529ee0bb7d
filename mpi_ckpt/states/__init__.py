# SPDX-License-Identifier: Apache-2.0
"""The states that come with the library.

None opens a file. torch is imported by those that are given something of torch's.
"""
