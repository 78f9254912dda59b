# SPDX-License-Identifier: Apache-2.0
"""`python -m services.fault_agent`."""

import gc
import sys

# A guest may be waiting, and nothing that is imported is garbage: lifecycle.spare_collector.
gc.disable()

from services.fault_agent.main import main  # noqa: E402

sys.exit(main())
