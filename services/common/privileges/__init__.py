# SPDX-License-Identifier: Apache-2.0
"""What a process may do on its node: it gives up the rest at its start. docs/hardening.md."""
