# SPDX-License-Identifier: Apache-2.0
"""Checks for a machine with a device; with ``DEVICE=cpu`` what means something without.

``scripts/device_checks`` runs them on two ranks, which share the device.
"""
