"""Train and eval mode, borrowed and given back: looking at a network must not change it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Let the block call ``train()`` and ``eval()`` freely, and give every submodule its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Give every submodule of ``target`` the mode of the submodule of ``source`` with the same name, if there is one."""
    modes = {name: part.training for name, part in source.named_modules()}
    for name, part in target.named_modules():
        part.training = modes.get(name, part.training)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the block with ``module`` in eval mode, and give every submodule its own mode back afterwards."""
    with modes_kept(module):
        module.eval()
        yield
