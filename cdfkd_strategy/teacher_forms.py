"""Working copies of frozen teachers: on the device, in its layout and precision, with BatchNorm folded into convolutions."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse as fold_batch_norm

from cdfkd_strategy.errors import ArchitectureError
from cdfkd_strategy.models.classifiers import final_linear
from cdfkd_strategy.models.stages import StagedClassifier, with_stages
from cdfkd_strategy.precision import all_digits, as_it_was, in_full, keep_depthwise_full
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.types import ImageSpec

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""A folded network must give the logits of the original on noise, up to this share of the largest: what a trace got wrong is not used."""


class Form(NamedTuple):
    """A network to compute with, and its linear classifier, whose input are the features (None without one)."""

    net: nn.Module
    linear: nn.Linear | None


class TeacherForms:
    """How each teacher is computed on one runtime.

    Args:
        image: what the teachers take, with ``C``.
        runtime: device, layout, precision, and whether to fold.
        resident: teachers that have copies on the device at a time; the least recently used one gives way. 0 is all, and
            then the originals are on the device and serve where nothing is folded.
        sharded: do several processes share the teachers out?
    """

    def __init__(self, image: ImageSpec, runtime: Runtime, resident: int = 0, *, sharded: bool = False) -> None:
        self.image, self.runtime, self.resident, self.sharded = image, runtime, resident, sharded
        self._kept: OrderedDict[tuple[nn.Module, bool], Form] = OrderedDict()
        self._checked: set[nn.Module] = set()
        self._unfoldable: set[nn.Module] = set()
        self._staged: WeakKeyDictionary[nn.Module, StagedClassifier | None] = WeakKeyDictionary()

    def get(self, net: nn.Module, *, observed: bool) -> Form:
        """The form of a teacher.

        Args:
            net: the original.
            observed: will something look at its BatchNorm layers? Then they are not folded.
        """
        folded = self.runtime.fold and not observed and net not in self._unfoldable
        if not folded and not self.resident:
            return Form(net, final_linear(net, self.image.num_classes))
        key = (net, folded)
        if key not in self._kept:
            while self.resident and len(self._kept) >= self.resident:
                self._forget(self._kept.popitem(last=False)[1])
            self._kept[key] = self._folded(net) if folded else self._placed(net)
        self._kept.move_to_end(key)
        return self._kept[key]

    def staged(self, net: nn.Module, *, observed: bool) -> tuple[Form, StagedClassifier | None]:
        """The form of a teacher, and the same with the maps of its stages; None if they cannot be found.

        A folded form whose stages are not those of the original gives way to the plain one.
        """
        form, original = self.get(net, observed=observed), self._with_stages(net)
        staged = original if original is None or form.net is net else self._with_stages(form.net)
        if original is None or (staged is not None and staged.shapes == original.shapes):
            return form, staged
        return (form, None) if observed else self.staged(net, observed=True)

    def _with_stages(self, form: nn.Module) -> StagedClassifier | None:
        if form not in self._staged:
            try:
                with self.runtime.autocast():
                    self._staged[form] = with_stages(form, self.image)
            except ArchitectureError as error:
                logger.info("%s has no stage maps (%s)", type(form).__name__, error)
                self._staged[form] = None
        return self._staged[form]

    def _forget(self, form: Form) -> None:
        """Let go of a copy, so that its memory is free at once and not when Python next looks for circles."""
        staged = self._staged.pop(form.net, None)
        if staged is not None:
            staged.let_go()

    def _placed(self, net: nn.Module) -> Form:
        """A copy on the device, BatchNorm and all."""
        placed = self._own(copy.deepcopy(net))
        return Form(placed, final_linear(placed, self.image.num_classes))

    def _own(self, net: nn.Module) -> nn.Module:
        """Place a copy that nobody else has."""
        if self.runtime.keeps_depthwise_full:
            keep_depthwise_full(net)
        return self.runtime.place(net)

    def _folded(self, net: nn.Module) -> Form:
        """The inference form, or the plain one of a network that cannot be folded."""
        linear = final_linear(net, self.image.num_classes)
        name = next((name for name, part in net.named_modules() if part is linear), None)
        try:
            copied = copy.deepcopy(net)
            as_it_was(copied.modules())
            folded = fold_batch_norm(copied, inplace=True)
            form = Form(folded, None if name is None else folded.get_submodule(name))  # type: ignore[arg-type]
            if net not in self._checked:
                self._check(net, folded)
                self._checked.add(net)
        except Exception as error:  # tracing runs foreign code: whatever it raises, the answer is the same
            logger.info("%s is computed as it is, its BatchNorm is not folded (%s: %s)", type(net).__name__, type(error).__name__, error)
            self._unfoldable.add(net)
            return self._placed(net) if self.resident else Form(net, linear)
        self._own(folded)
        if self.runtime.precision == "bfloat16":
            for part in folded.modules():
                if type(part) in (nn.Conv2d, nn.Linear):
                    part.bfloat16()
        return form

    @torch.no_grad()
    def _check(self, net: nn.Module, folded: nn.Module) -> None:
        """Both must give the same logits on noise, in the precision of their weights even where a method computes in another.

        Raises:
            ArchitectureError: they do not.
        """
        device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
        noise = torch.randn(4, *self.image.shape, generator=torch.Generator().manual_seed(0)).to(device)
        with all_digits(), in_full(noise):
            expected = net(noise)
            difference = (folded(noise) - expected).abs().max() / expected.abs().max()
        if not difference <= TOLERANCE:
            raise ArchitectureError(f"its folded form is off by {float(difference):.1%}")
