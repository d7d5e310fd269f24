"""``python -m cdfkd_strategy`` is the ``cdfkd`` command."""

from __future__ import annotations

import sys

from cdfkd_strategy.cli import main

sys.exit(main())
