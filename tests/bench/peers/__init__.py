# SPDX-License-Identifier: Apache-2.0
"""The same guest with the same workload, moved by ours and by others, in turns."""
