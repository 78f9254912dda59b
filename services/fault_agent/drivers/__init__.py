# SPDX-License-Identifier: Apache-2.0
"""One driver per VMM, and what they need from the host."""
