# SPDX-License-Identifier: Apache-2.0
"""python -m services.orchestrator."""

import sys

from services.orchestrator.main import main

if __name__ == "__main__":
    sys.exit(main())
