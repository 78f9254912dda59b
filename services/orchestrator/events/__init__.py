# SPDX-License-Identifier: Apache-2.0
"""What changes in the fleet, for whoever watches: read once, rendered once, told to all."""
