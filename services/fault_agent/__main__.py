# SPDX-License-Identifier: Apache-2.0
"""`python -m services.fault_agent`."""

import sys

from services.fault_agent.main import main

sys.exit(main())
