# SPDX-License-Identifier: Apache-2.0
"""The REST face's doors, and how an orchestrator is told whom to let in."""
