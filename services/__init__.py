# SPDX-License-Identifier: Apache-2.0
"""Godwit's services: an application, installed in an environment or image of its own."""
