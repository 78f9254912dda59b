# SPDX-License-Identifier: Apache-2.0
"""`python -m services.page_server`."""

import sys

from services.page_server.main import main

sys.exit(main())
