# SPDX-License-Identifier: Apache-2.0
"""Serves the memory of a node's guests to their destinations: a process around the C core."""
