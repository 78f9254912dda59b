# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/godwit/kubelet/v1beta1 by `make proto`."""
