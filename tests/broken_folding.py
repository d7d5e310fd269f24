"""A folding that is wrong on purpose, for the tests that must find it."""

from __future__ import annotations

from typing import Any

from torch import nn

from cdfkd_strategy import teacher_forms

_FOLD = teacher_forms.fold_batch_norm


def fold_without_bias(net: nn.Module, **options: Any) -> nn.Module:
    """BatchNorm folded into convolutions, its bias forgotten."""
    folded = _FOLD(net, **options)
    for part in folded.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
    return folded
