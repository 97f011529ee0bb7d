# SPDX-License-Identifier: Apache-2.0
"""Keeps generations on the hosts' own disks: placing, saving, finding the newest whole."""
