# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/godwit/kubelet by `make proto`."""
