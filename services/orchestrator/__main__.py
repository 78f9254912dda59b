# SPDX-License-Identifier: Apache-2.0
"""python -m services.orchestrator."""

import gc
import sys

# A guest may be waiting, and nothing that is imported is garbage: lifecycle.spare_collector.
gc.disable()

from services.orchestrator.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
