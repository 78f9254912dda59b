# SPDX-License-Identifier: Apache-2.0
# What cffi compiles. Its types are those of native/include/godwit; the drift test compares them.
from typing import Any

ffi: Any
lib: Any
