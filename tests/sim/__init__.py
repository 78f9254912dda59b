# SPDX-License-Identifier: Apache-2.0
"""What the tests are built with; nothing here is a test."""
