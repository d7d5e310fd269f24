"""One header for all: the fused answer of K headers, distilled into a fresh header on the same frozen trunk.

Broadcasting one header instead of K costs a client a K-th of the traffic, and shows it no single client's header. The
trunk stays as it is, so the headers of the full student still fit it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cdfkd_strategy import seeding
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.models.head_fusion import class_weights, fuse
from cdfkd_strategy.models.modes import evaluating
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.schedules import cosine, set_rate

Sampler = Callable[[int, torch.Generator], Tensor]
"""``(count, rng) -> normalised images [count, channels, H, W]``: a generator, a pool, or real images."""


def distill_single_header(
    student: MultiHeaderStudent,
    weights: Tensor,
    sample: Sampler,
    *,
    steps: int = 300,
    batch_size: int = 128,
    lr: float = 1e-3,
    rng: torch.Generator,
    runtime: Runtime,
) -> MultiHeaderStudent:
    """Train a student with one header to answer as the fused headers do: KL(fused || single) on synthetic images.

    Not in the paper. Adam, its rate annealed to 0 along a cosine; trunk in eval mode and without gradients, the header
    in train mode. Computed in the runtime's scope, since bits depend on it.

    Args:
        student: the full student; unchanged.
        weights: ``[K]`` or ``[K, C]`` for `fuse`.
        sample: gives synthetic images.
        steps: optimiser steps.
        batch_size: images per step, at least 2 (BatchNorm).
        lr: Adam's first rate.
        rng: a CPU generator; seeds the fresh header and draws the images.
        runtime: device and layout.

    Returns:
        A new student with ``heads == 1``, in eval mode on the runtime's device; its trunk equals the given one's.

    Raises:
        ConfigError: fewer than 1 step, or a batch of fewer than 2 images.
    """
    if steps < 1 or batch_size < 2:
        raise ConfigError(f"a single header got {steps} steps of {batch_size} images; accepted: at least 1 step of 2 images")
    table = class_weights(weights, student.heads, student.image.num_classes).to(runtime.device)
    single = _fresh_header(student, int(torch.randint(2**62, (), generator=rng)))
    full, single = runtime.place(student), runtime.place(single)
    single.requires_grad_(False)
    header = single.headers[0].requires_grad_(True)
    optimizer = torch.optim.Adam(header.parameters(), lr=lr)
    with runtime.scope(), evaluating(full), torch.enable_grad():
        single.eval()
        header.train()
        for step in range(steps):
            set_rate(optimizer, lr * cosine(step, steps))
            with torch.no_grad():
                images = runtime.images(sample(batch_size, rng))
                target = fuse(full(images).logits, table)
                maps = single.trunk_features(images)
            logits, _ = header(maps)
            loss = kl_divergence(logits.log_softmax(1), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return single.eval().requires_grad_(True)


def _fresh_header(student: MultiHeaderStudent, seed: int) -> MultiHeaderStudent:
    """A copy of the student with one freshly initialised header."""
    with seeding.seeded_scope("single header", seed):
        grown = student.with_heads(student.heads + 1)
    single = grown.with_heads(1)
    single.headers[0] = grown.headers[-1]
    return single
