"""What leaves a client of this project, in words: one entry per thing that a reply to a train message carries.

`tests/flower/test_disclosure.py` holds it against what the client really sends.
"""

from __future__ import annotations

from collections.abc import Mapping

from cdfkd_strategy.flower import payload
from cdfkd_strategy.types import Needs

ALWAYS: Mapping[str, str] = {
    payload.ARRAYS: "all weights, BatchNorm running statistics included",
    payload.NUM_EXAMPLES: "number of training examples",
    payload.METRICS: "local training loss and accuracy",
    payload.ARCH: "architecture name",
    payload.PARTITION_ID: "partition id",
    payload.NUM_CLASSES: "number of classes",
}
"""In every upload, whatever the method: record key -> what it tells the server."""

OPTED_IN: Mapping[str, str] = {payload.LABEL_COUNTS: "label counts per class"}
"""In an upload only if the server asks for it and the client consents."""


def disclosed(*, label_counts: bool) -> list[str]:
    """What a client tells the server with every upload.

    Args:
        label_counts: were the counts opted in?
    """
    return [*ALWAYS.values(), *(OPTED_IN.values() if label_counts else ())]


def needed(needs: Needs) -> list[str]:
    """What of it, and what beyond it, a method cannot do without, in words."""
    return [Needs.words(need) for need in needs.disclosed()]
