# SPDX-License-Identifier: Apache-2.0
"""`python -m services.node_keeper`."""

import sys

from services.node_keeper.main import main

sys.exit(main())
