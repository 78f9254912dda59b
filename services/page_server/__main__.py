# SPDX-License-Identifier: Apache-2.0
"""`python -m services.page_server`."""

import gc
import sys

# A guest may be waiting, and nothing that is imported is garbage: lifecycle.spare_collector.
gc.disable()

from services.page_server.main import main  # noqa: E402

sys.exit(main())
