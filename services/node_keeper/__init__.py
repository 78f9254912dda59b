# SPDX-License-Identifier: Apache-2.0
"""What stands beside a node's agent and tells the world about the node; guests need none of it."""
