# SPDX-License-Identifier: Apache-2.0
"""The only importer of the native page path: its face (api), the real one (native), a fake."""
