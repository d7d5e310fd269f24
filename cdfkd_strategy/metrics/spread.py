"""A mean and its standard deviation over seeds, as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Fractions as "mean ± standard deviation" in %; "-" if one of them does not exist."""
    known = [100 * value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.fmean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"
