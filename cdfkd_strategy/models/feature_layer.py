"""A late linear layer of a classifier: which one it is, and what the layers behind it make of its output."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.classifiers import final_linear
from cdfkd_strategy.types import ImageSpec

LayerName = Literal["fc2", "classes"]


def feature_layer(model: nn.Module, num_classes: int, name: LayerName = "fc2") -> nn.Linear:
    """The linear classifier of a network, or the linear layer before it.

    Args:
        model: a classifier.
        num_classes: ``C``.
        name: "classes" is the classifier; "fc2" the linear layer before it, recognised by giving as many values as the classifier takes, and the
            classifier itself where there is none (a network with one linear layer).

    Raises:
        ArchitectureError: there is no linear classifier.
    """
    classifier = final_linear(model, num_classes)
    if classifier is None:
        raise ArchitectureError(f"{type(model).__name__} has no linear layer that gives {num_classes} classes; accepted: networks that end in one")
    before = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not classifier][-1:]
    return before[0] if name == "fc2" and before and before[0].out_features == classifier.in_features else classifier


@torch.no_grad()
def replay(model: nn.Module, layer: nn.Linear, outputs: Tensor, image: ImageSpec) -> Tensor:
    """The logits ``[B, C]`` that a network would give if one of its layers gave ``outputs``.

    The network itself runs, on blank images, so that whatever stands behind the layer (activation, normalisation, dropout) acts as
    it does on real ones.

    Args:
        model: in eval mode.
        layer: one of its layers.
        outputs: ``[B, D]``, what the layer is to give.
        image: what the network takes.
    """
    outputs = outputs.to(layer.weight)
    hook = layer.register_forward_hook(lambda *_: outputs)
    try:
        logits: Tensor = model(torch.zeros(len(outputs), *image.shape).to(layer.weight))
    finally:
        hook.remove()
    return logits
