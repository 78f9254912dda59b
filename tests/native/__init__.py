# SPDX-License-Identifier: Apache-2.0
"""The C core held against implementations that are not ours."""
