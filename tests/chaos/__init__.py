# SPDX-License-Identifier: Apache-2.0
"""Faults of every kind, in migrations of verifying guests between real processes: `make chaos`."""
