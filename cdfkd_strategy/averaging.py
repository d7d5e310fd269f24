"""Averages of weights: one-shot federated averaging as a baseline, and as a start for the student's trunk."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdfkd_strategy.teachers import TeacherSpec


def average_state(models: Sequence[nn.Module], num_samples: Sequence[int]) -> dict[str, Tensor]:
    """The sample-weighted mean of the state dicts of networks of one architecture, on the CPU.

    BatchNorm buffers are averaged too; integer ones are taken from the first network. Sums are in float64.

    Args:
        models: at least one, all of the same architecture.
        num_samples: per network; if one is unknown (0), all weigh the same.
    """
    sizes = torch.tensor([float(size) for size in num_samples], dtype=torch.float64)
    shares = sizes / sizes.sum() if bool((sizes > 0).all()) else torch.full_like(sizes, 1 / len(models))
    states = [{name: tensor.detach().cpu() for name, tensor in model.state_dict().items()} for model in models]
    average = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            stacked = torch.stack([state[name].double() for state in states])
            average[name] = torch.tensordot(shares, stacked, dims=1).to(first.dtype)
        else:
            average[name] = first
    return average


def fedavg(models: Sequence[nn.Module], specs: Sequence[TeacherSpec]) -> nn.Module | None:
    """The sample-weighted average of the weights of the largest group of one architecture, BatchNorm buffers included.

    All clients started from one initialisation per architecture and never received an average, so this is one-shot
    federated averaging (arXiv:1602.05629). Ties go to the architecture whose first client comes first.

    Args:
        models: K teachers.
        specs: their descriptions; without any sample count all weigh the same.

    Returns:
        A new network on the CPU, in eval mode; None if the largest group has fewer than two members.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, spec in enumerate(specs):
        groups[spec.arch].append(index)
    members = max(groups.values(), key=len)
    if len(members) < 2:
        return None
    average = copy.deepcopy(models[members[0]]).cpu()
    average.load_state_dict(average_state([models[index] for index in members], [specs[index].num_samples for index in members]))
    return average.eval()
