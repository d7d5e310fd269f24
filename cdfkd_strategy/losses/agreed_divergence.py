"""How far is the student from the teachers where both decide alike? What CMI (https://arxiv.org/abs/2105.08584) and FastDFKD lead images to."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cdfkd_strategy.precision import full


def agreed_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_b 1[argmax S = argmax T] KL(T || S)``, in nats: zero for images that the student takes for another class.

    Where they disagree the images would only have to leave the teacher's class to raise the divergence. The mean runs over the
    whole batch, and over headers.

    Args:
        student: logits or log-probabilities ``[heads, B, C]``.
        teacher: the same shape.
    """
    mine, theirs = F.log_softmax(full(student), dim=-1), F.log_softmax(full(teacher), dim=-1)
    agree = mine.argmax(-1) == theirs.argmax(-1)
    return ((theirs.exp() * (theirs - mine)).sum(-1) * agree).mean()
