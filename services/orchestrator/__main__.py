# SPDX-License-Identifier: Apache-2.0
"""python -m services.orchestrator."""

import gc
import sys

# A guest may be waiting, and nothing that is imported is garbage: lifecycle.spare_collector.
gc.disable()

from services.common.privileges import capabilities  # noqa: E402
from services.orchestrator.main import main  # noqa: E402

if __name__ == "__main__":
    # It touches no guest and no device: ports, a file and the network.
    capabilities.keep_only([capabilities.Capability.NET_BIND_SERVICE])
    sys.exit(main())
