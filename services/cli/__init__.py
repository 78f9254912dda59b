# SPDX-License-Identifier: Apache-2.0
"""The `godwit` command: starts the services, asks the orchestrator, runs the demo."""
