# SPDX-License-Identifier: Apache-2.0
"""Defines the format on disk: names, manifest, safetensors. Pure."""
