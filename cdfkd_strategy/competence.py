"""Which teacher knows which class? Estimates of ``[K, C]`` weights from the teachers' own weights, without label counts.

Under label skew a uniform ensemble is the bottleneck (methods that ask clients for their counts ``n_kc`` know that;
asking is a disclosure). Two traces of the label distribution are already in the uploaded weights:

- ``norm_features``: features drawn from the affine parameters of the last normalisation layer, a Gaussian with mean
  ``beta`` and standard deviation ``|gamma|``, through ReLU and the last linear layer; the mean softmax ``F_kc`` is close
  to the class frequencies the teacher was trained on.
  Of a residual network, whose features are a sum, it sees the branch of that layer alone (the shortcut's, in ResNet-8).
- ``row_norm``: the classifier rows of classes that a teacher has seen more often are longer: ``||W_c||^4``.

``auto`` is ``sqrt(N_k F_kc) ||W_c||``: with the number of samples ``N_k`` that every Flower reply carries, ``N_k F_kc`` is
one estimate of the count and ``||W_c||^2`` grows like another; this is their geometric mean. Sharper scores fail where a
client has hardly more than one class: its teacher is sure of that class on every image, and only the small weights of
the other teachers can contradict it in `fuse`.

The weights are the scores divided by their sum over the teachers. Everything here is a reconstruction of this project,
chosen on held-out training images; `simulations/LOG.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cdfkd_strategy.errors import NeedsError
from cdfkd_strategy.models.classifiers import final_linear
from cdfkd_strategy.models.head_fusion import class_weights
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec

Score = Callable[[nn.Module, int, torch.Generator], Tensor | None]
"""A teacher and its number of training samples to its class scores ``[C]``, or None if it lacks what the estimate needs."""

COMPETENCE: Registry[Score] = Registry("competence estimate")

LABEL_COUNTS = "label_counts"
"""Not an estimate: the setting by which clients are asked for their label counts, an explicit opt-in and a disclosure."""

SAMPLES = 4096
"""Feature vectors drawn per teacher by ``norm_features``."""


@COMPETENCE.register("norm_features")
@torch.no_grad()
def norm_feature_score(net: nn.Module, samples: int, rng: torch.Generator) -> Tensor | None:  # noqa: ARG001 - one signature for all
    """Mean softmax of features drawn from the last affine BatchNorm or GroupNorm layer as wide as the classifier's input."""
    linear = final_linear(net)
    norms = [m for m in net.modules() if linear is not None and _width(m) == linear.in_features]
    if linear is None or not norms:
        return None
    gamma, beta = norms[-1].weight, norms[-1].bias
    assert isinstance(gamma, Tensor)
    assert isinstance(beta, Tensor)
    noise = torch.randn(SAMPLES, linear.in_features, generator=rng).to(gamma.device)
    return linear(torch.relu(beta + noise * gamma.abs())).softmax(-1).mean(0).cpu()


def _width(module: nn.Module) -> int | None:
    """Channels of an affine normalisation layer, or None for anything else."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
        return module.num_features
    if isinstance(module, nn.GroupNorm) and module.affine:
        return module.num_channels
    return None


@torch.no_grad()
def row_norms(net: nn.Module) -> Tensor | None:
    """``||W_c||`` of the last linear layer ``[C]``, in float64: powers of absurd weights overflow in float32. None without such a layer."""
    linear = final_linear(net)
    return None if linear is None else torch.linalg.vector_norm(linear.weight.double().cpu(), dim=1)


@COMPETENCE.register("row_norm")
def row_norm_score(net: nn.Module, samples: int, rng: torch.Generator) -> Tensor | None:  # noqa: ARG001 - one signature for all
    """``||W_c||^4`` of the last linear layer."""
    rows = row_norms(net)
    return None if rows is None else rows**4


@COMPETENCE.register("uniform")
def uniform_score(net: nn.Module, samples: int, rng: torch.Generator) -> Tensor | None:  # noqa: ARG001 - one signature for all
    """Every class the same; works for every teacher."""
    return torch.ones(())


@COMPETENCE.register("auto")
def auto_score(net: nn.Module, samples: int, rng: torch.Generator) -> Tensor | None:
    """``sqrt(N_k F_kc) ||W_c||``; where no normalisation layer fits, ``F_kc`` is the row norms' share, ``||W_c||^4 / sum_c ||W_c||^4``."""
    rows, features = row_norms(net), norm_feature_score(net, samples, rng)
    if rows is None:
        return None
    frequencies = rows**4 / (rows**4).sum() if features is None else features.to(rows)
    return (samples * frequencies).sqrt() * rows


def estimate(teachers: TeacherEnsemble, image: ImageSpec, rng: torch.Generator, name: str = "auto") -> Tensor:
    """Class weights of the teachers, from their weights alone.

    Args:
        teachers: the ensemble; its own ``weights`` are ignored. Where the number of samples of a teacher is not known
            (0 in its spec), all count as equally many.
        image: gives ``C``.
        rng: randomness of sampling estimates (a CPU generator).
        name: a name in `COMPETENCE`.

    Returns:
        ``[K, C]``, columns sum to 1.

    Raises:
        UnknownNameError: no such estimate.
        NeedsError: a teacher lacks what the estimate needs.
    """
    score_of = COMPETENCE[name]
    counts = [spec.num_samples for spec in teachers.specs]
    scores = [score_of(net, count if min(counts) > 0 else 1, rng) for net, count in zip(teachers.nets, counts, strict=True)]
    lacking = [spec.key for spec, score in zip(teachers.specs, scores, strict=True) if score is None or score.numel() not in (1, image.num_classes)]
    if lacking:
        raise NeedsError(
            f"competence estimate {name!r} does not work for teachers {', '.join(lacking)}; use weights 'uniform', "
            "or networks that end in a linear layer with one output per class"
        )
    table = torch.stack([score.expand(image.num_classes) for score in scores if score is not None])
    return class_weights(table.clamp_min(torch.finfo(table.dtype).tiny), len(teachers), image.num_classes).float()


def weights_of(scores: Tensor, live: Sequence[bool] | None = None) -> Tensor:
    """Class weights of scores, such as label counts: ``s_kc / sum_k s_kc``; a class of which nobody has any is shared equally.

    Args:
        scores: ``[K, C]``, at least 0.
        live: K, may the teacher be used? All others have no weight. None is all.

    Returns:
        ``[K, C]`` float32, columns sum to 1.
    """
    alive = torch.ones(len(scores), 1) if live is None else torch.tensor(live)[:, None]
    table = scores.double() * alive
    nobody = table.sum(0) == 0
    table[:, nobody] = alive.double().expand_as(table)[:, nobody]
    return class_weights(table, *table.shape).float()
