# SPDX-License-Identifier: Apache-2.0
"""A fleet on a virtual clock, moved by the orchestrator's own scheduling."""
