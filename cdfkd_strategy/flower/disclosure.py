"""What leaves a client of this project, in words: one entry per thing that a reply to a train or evaluate message carries.

`tests/flower/test_disclosure.py` holds it against what the client really sends.
"""

from __future__ import annotations

from collections.abc import Mapping

from cdfkd_strategy.flower import payload
from cdfkd_strategy.types import Needs

ALWAYS: Mapping[str, str] = {
    payload.ARRAYS: "all weights, BatchNorm running statistics included",
    payload.NUM_EXAMPLES: "number of training examples",
    payload.TRAIN_METRICS["loss"]: "local training loss",
    payload.TRAIN_METRICS["accuracy"]: "local training accuracy",
    payload.ARCH: "architecture name",
    payload.PARTITION_ID: "partition id",
    payload.NUM_CLASSES: "number of classes",
}
"""In every upload, whatever the method: record key -> what it tells the server."""

LATER: Mapping[str, str] = {payload.TRAIN_METRICS["student_kl"]: "divergence of its teacher from the student"}
"""In an upload from round 2 on."""

OPTED_IN: Mapping[str, str] = {payload.LABEL_COUNTS: "label counts per class"}
"""In an upload only if the server asks for it and the client consents."""

EVALUATED: Mapping[str, str] = {
    payload.STUDENT_ACCURACY: "local accuracy of the student",
    payload.TEACHER_ACCURACY: "local accuracy of its teacher",
    payload.NUM_EXAMPLES: "number of test examples",
}
"""In the metrics of a client that evaluates the student; accuracies only if it has test examples."""

ATTENTION: Mapping[str, str] = {
    payload.WEIGHT: "C weights of attention over headers",
    payload.BIAS: "their bias",
    payload.NUM_EXAMPLES: "number of examples they were fitted on",
}
"""Besides, from a client that evaluates a student with several headers."""


FAILED = "the text of its error, which may name files, folders and numbers of images"
"""In the reply of a client that fails."""


def disclosed(*, label_counts: bool) -> list[str]:
    """Everything that a client tells the server, in all rounds of a run.

    Args:
        label_counts: were the counts opted in?
    """
    return [
        *ALWAYS.values(),
        *(OPTED_IN.values() if label_counts else ()),
        f"from round 2 on: {', '.join(LATER.values())}",
        f"if it evaluates: {', '.join((*EVALUATED.values(), *ATTENTION.values()))}",
        f"if it fails: {FAILED}",
    ]


def needed(needs: Needs) -> list[str]:
    """What of it, and what beyond it, a method cannot do without, in words."""
    return [Needs.words(need) for need in needs.disclosed()]
