# SPDX-License-Identifier: Apache-2.0
"""Generated from protos/godwit/fleet/v1 by `make proto`."""
