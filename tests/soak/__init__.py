# SPDX-License-Identifier: Apache-2.0
"""Long runs: the same as the tests, more often than `make test` has time for."""
