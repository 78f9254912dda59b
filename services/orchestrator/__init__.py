# SPDX-License-Identifier: Apache-2.0
"""Decides which node owns which guest, and carries every move through to its end."""
