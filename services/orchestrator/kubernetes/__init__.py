# SPDX-License-Identifier: Apache-2.0
"""The orchestrator as a Kubernetes controller: its objects mirror the store, the store decides."""
