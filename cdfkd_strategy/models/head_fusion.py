"""From the logits of K headers (or teachers) to one answer: class-wise weighted fusion, and attention over headers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.errors import ConfigError, DataError
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.models.plain_student import Student
from cdfkd_strategy.precision import full, in_full


def class_weights(weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None, heads: int, num_classes: int) -> Tensor:
    """Weights per teacher, or per teacher and class, as ``[K, C]`` with columns that sum to 1.

    Args:
        weights: ``[K]`` (broadcast over classes), ``[K, C]``, or None for equal weights; not negative, any scale.
        heads: ``K``.
        num_classes: ``C``.

    Returns:
        ``[K, C]``, a new floating-point tensor on the device of ``weights``.

    Raises:
        ConfigError: another shape, a negative or non-finite value, or a class that no teacher has weight for.
    """
    given = torch.ones(heads) if weights is None else torch.as_tensor(weights).detach()
    if not given.is_floating_point():
        given = given.float()
    if given.shape not in ((heads,), (heads, num_classes)):
        raise ConfigError(f"weights have the shape {list(given.shape)}; accepted: [K] = [{heads}] or [K, C] = [{heads}, {num_classes}]")
    table = given if given.dim() == 2 else given[:, None].expand(heads, num_classes)
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()):
        raise ConfigError("weights hold a negative or non-finite value; accepted: finite numbers of at least 0")
    totals = table.sum(dim=0)
    if bool((totals <= 0).any()):
        empty = torch.nonzero(totals <= 0).flatten().tolist()
        raise ConfigError(f"the weights of classes {empty} are 0 for all {heads} teachers; give at least one teacher a positive weight in every class")
    return table / totals


def weighted(weights: Tensor) -> list[int]:
    """The teachers (or headers) that count: the rows of ``[K, C]`` with a weight for some class. One that is too old has none."""
    return torch.nonzero((weights > 0).any(dim=1)).flatten().tolist()


def header_weights(weights: Tensor, heads: int) -> Tensor:
    """Class weights ``[heads, C]`` of a student's headers: those of the teachers ``[K, C]`` where each has its header, else equal ones."""
    return weights if heads == len(weights) else torch.full_like(weights[:1], 1 / heads).expand(heads, -1)


def fuse(logits: Tensor, weights: Tensor) -> Tensor:
    """The weighted log-opinion pool behind ensemble rows, the fused loss and the merged student.

    ``log_softmax_c( sum_k w[k, c] * log_softmax(logits_k)[c] )``. Each member is normalised first, so that a teacher
    with large logits does not outvote the others. Half precision is raised to float32: log-probabilities of rare
    classes would otherwise be rounded away.

    Args:
        logits: ``[K, B, C]``.
        weights: ``[K, C]``, columns that sum to 1 (`class_weights`).

    Returns:
        Log-probabilities ``[B, C]``, in nats.

    Raises:
        ConfigError: the shapes do not belong together.
    """
    if logits.dim() != 3 or weights.shape != (logits.shape[0], logits.shape[2]):
        raise ConfigError(f"cannot fuse logits {list(logits.shape)} with weights {list(weights.shape)}; accepted: [K, B, C] with [K, C]")
    with in_full(logits):
        log_probabilities = F.log_softmax(full(logits), dim=2)
        pooled = torch.einsum("kbc,kc->bc", log_probabilities, weights.to(log_probabilities.dtype))
        return F.log_softmax(pooled, dim=1)


class HeadAttention(nn.Module):
    """Attention over headers: one shared ``Linear(C, 1)`` scores every header's logits, sample by sample.

    CDFKD (ICME 2021), the attention aggregation: ``e_k = Linear(z_k)``, ``alpha = softmax_k(e)``,
    ``sum_k alpha_k z_k``. Differs from the authors' code: the weight starts at 0, so that an unfitted module is the
    plain mean of the headers, and C is free (theirs is 10). The bias cancels in the softmax; it is kept for parity.

    Args:
        num_classes: ``C``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # the layer draws weights that are not wanted
            self.score = nn.Linear(num_classes, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, logits: Tensor) -> Tensor:
        """``logits [K, B, C]`` to the attended logits ``[B, C]``."""
        alpha = torch.softmax(self.score(logits), dim=0)
        return (alpha * logits).sum(dim=0)


def fit_head_attention(
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 30,
    lr: float = 0.01,
    batch_size: int = 100,
    rng: torch.Generator,
) -> HeadAttention:
    """Fit `HeadAttention` on a few real labelled samples; the student is frozen and in eval mode.

    CDFKD (ICME 2021): cross-entropy, Adam. Differs from the authors' code: the last epoch is kept (they pick the best
    one on the test set). The student's logits are computed once, since it does not change.

    Args:
        student: gives `StudentOutputs`; left as it was found.
        images: normalised, ``[N, channels, H, W]``, on the student's device.
        labels: ``[N]``, int64.
        epochs: passes over the samples.
        lr: of Adam.
        batch_size: samples per step.
        rng: a CPU generator; shuffles the samples.

    Returns:
        The fitted module, in eval mode, on the device of ``images``.

    Raises:
        DataError: no samples, or not one label per image.
    """
    if len(images) == 0 or labels.shape != (len(images),):
        raise DataError(f"attention over heads got {len(images)} images and labels {list(labels.shape)}; accepted: at least one image, one label each")
    with torch.no_grad(), evaluating(student):
        logits = torch.cat([student(batch).logits for batch in torch.split(images, batch_size)], dim=1).float()
    attention = HeadAttention(logits.shape[2]).to(logits.device)
    optimiser = torch.optim.Adam(attention.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(labels), generator=rng).to(logits.device), batch_size):
                loss = F.cross_entropy(attention(logits[:, chosen]), labels[chosen])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return attention.requires_grad_(False).eval()


class FusedStudent(nn.Module):
    """A multi-header student as one plain classifier: pixels in, ``[B, C]`` out.

    It always computes in eval mode. The student is shared, not copied: it may go on training elsewhere, and its mode
    is left as it is.

    Args:
        student: the student; its ``image`` says how pixels are normalised.
        weights: ``[K]`` or ``[K, C]`` for `fuse`; None weighs all headers equally.
        attention: a fitted `HeadAttention` instead of weights.

    Raises:
        ConfigError: both weights and attention came, or the weights do not fit the student.
    """

    weights: Tensor

    def __init__(self, student: Student, weights: Tensor | None = None, attention: HeadAttention | None = None) -> None:
        super().__init__()
        if weights is not None and attention is not None:
            raise ConfigError("a fused student got weights and attention; accepted: one of them")
        self.training = False
        self.student = student
        self.image = student.image
        self.attention = attention
        device = next(student.parameters()).device
        self.register_buffer("weights", class_weights(weights, student.heads, student.image.num_classes).to(device))

    def train(self, mode: bool = True) -> FusedStudent:  # noqa: ARG002 - nn.Module's signature
        """Stay in eval mode, whatever was asked for: there is nothing to train here."""
        super().train(False)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify images.

        Args:
            pixels: ``[B, channels, H, W]`` in [0, 1], floating point.

        Returns:
            Log-probabilities ``[B, C]`` in nats, or the attended logits ``[B, C]`` if there is an attention module.

        Raises:
            DataError: the images are not floating point, or of another shape.
        """
        if not pixels.is_floating_point() or tuple(pixels.shape[1:]) != self.image.shape:
            raise DataError(f"images are {pixels.dtype} {list(pixels.shape)}; accepted: floating point in [0, 1], [B, {', '.join(map(str, self.image.shape))}]")
        with evaluating(self.student):
            logits = self.student(self.image.normalise(pixels)).logits
        return fuse(logits, self.weights) if self.attention is None else self.attention(logits)
