# SPDX-License-Identifier: Apache-2.0
"""Godwit's API: the generated contracts, and the REST client in `godwit.client`.

Importing the package imports nothing else, so that a program that needs the contracts alone starts
without an HTTP stack.
"""
