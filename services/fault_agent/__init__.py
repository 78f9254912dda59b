# SPDX-License-Identifier: Apache-2.0
"""Owner of the VMs of one node: starts them, moves them away, receives them."""
