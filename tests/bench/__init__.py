# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: they time, and assert nothing about it."""
