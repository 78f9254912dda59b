# SPDX-License-Identifier: Apache-2.0
"""`python -m services.device_plugin`."""

import sys

from services.device_plugin.main import main

sys.exit(main())
