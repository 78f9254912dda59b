# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/godwit/common by `make proto`."""
