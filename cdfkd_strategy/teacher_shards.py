"""Teachers shared out among processes: each keeps some on its device, and asks the others about the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdfkd_strategy import parallel
from cdfkd_strategy.errors import ConfigError

Answer = tuple[Tensor, Tensor | None, Tensor | None]
"""Logits ``[B, C]``, features ``[B, D_k]`` and distances ``[L_k]`` of one teacher; the last two may not be there."""


def answers_of_all(answer: Callable[[nn.Module, Tensor], Answer], nets: Sequence[nn.Module], numbers: Sequence[int], images: Tensor) -> list[Answer]:
    """What every teacher says of this process's images; process r computes teachers r, r + P, ... on the images of all.

    Of the teachers of a step a process may have more than its share, or none: always the same ones are its own, so that they stay on its device.

    Differentiable in the images, on all processes at once: each must ask for gradients, or none.

    Args:
        answer: computes one teacher on the whole batch ``[B, channels, H, W]``.
        nets: K teachers, the same on all processes, at least as many as these.
        numbers: of every one among all teachers, which says whose it is.
        images: this process's rows, ``[B / P, channels, H, W]``.

    Raises:
        ConfigError: a process would have no teacher.
    """
    if len(nets) < parallel.size():
        raise ConfigError(f"engine.shard_teachers shares out {len(nets)} teachers among {parallel.size()} processes; accepted: at least one for each")
    batch, owners = parallel.whole(images), [number % parallel.size() for number in numbers]
    mine = [answer(net, batch) for net, owner in zip(nets, owners, strict=True) if owner == parallel.rank()]
    sizes = torch.zeros(max(map(owners.count, owners)), 3, dtype=torch.long)  # on the CPU: the device need not be waited for
    for row, parts in zip(sizes, mine, strict=False):
        row.copy_(torch.tensor([0 if part is None else part.numel() for part in parts]))
    table = parallel.everyone(sizes)
    nothing = batch.flatten()[:0]  # a process without a teacher takes part in the backward pass too
    flat = torch.cat([nothing, *(part.flatten() for parts in mine for part in parts if part is not None)])
    found = parallel.everyone(F.pad(flat, (0, int(table.sum((1, 2)).max()) - len(flat))))
    answers: list[Answer] = []
    pieces = [row[: int(counts.sum())].split(counts.flatten().tolist()) for row, counts in zip(found, table, strict=True)]
    for k, owner in enumerate(owners):
        place = owners[:k].count(owner)
        logits, features, distances = pieces[owner][3 * place : 3 * place + 3]
        rows = [parallel.own_rows(part.view(len(batch), -1)) if len(part) else None for part in (logits, features)]
        assert rows[0] is not None
        answers.append((rows[0], rows[1], distances if len(distances) else None))
    return answers
