# SPDX-License-Identifier: Apache-2.0
"""The fault agent with a real QEMU."""
