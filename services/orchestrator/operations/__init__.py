# SPDX-License-Identifier: Apache-2.0
"""Long-running operations over many VMs: drain, undrain, rebalance, batch."""
