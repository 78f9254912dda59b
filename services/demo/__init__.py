# SPDX-License-Identifier: Apache-2.0
"""The demo: a small Linux guest that moves between two nodes, and the verdict on how it went."""
