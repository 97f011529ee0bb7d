# SPDX-License-Identifier: Apache-2.0
"""What happens at a step: votes, the next save, a request to stop."""
