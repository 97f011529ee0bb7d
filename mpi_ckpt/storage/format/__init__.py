# SPDX-License-Identifier: Apache-2.0
"""The format on disk: names, manifest, safetensors. Pure."""
