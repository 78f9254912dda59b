# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/godwit/agent by `make proto`."""
