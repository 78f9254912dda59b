# SPDX-License-Identifier: Apache-2.0
"""Offers device nodes of this machine to the pods of its kubelet."""
