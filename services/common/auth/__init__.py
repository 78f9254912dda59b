# SPDX-License-Identifier: Apache-2.0
"""Who calls, whether he may, and what is written down about it. docs/api-access.md."""
