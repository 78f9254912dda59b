# SPDX-License-Identifier: Apache-2.0
"""What every Godwit process shares: errors, telemetry, gRPC at both ends, life cycle."""
