# SPDX-License-Identifier: Apache-2.0
"""Godwit's tests."""

import os

# Tests start programs while channels of theirs are open. In the child gRPC's handlers of fork(2)
# may end it before its program begins ("Other threads are currently calling into gRPC").
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
