# SPDX-License-Identifier: Apache-2.0
"""Godwit's API: the generated contracts, for services and for clients alike."""
