"""The networks that clients may train: which names are accepted, the common initialisation, what an upload must fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.competence import COMPETENCE, estimate
from cdfkd_strategy.errors import ArchitectureError, CDFKDError, UploadError
from cdfkd_strategy.flower.arrays import from_record
from cdfkd_strategy.local_training import initial_model
from cdfkd_strategy.models.classifiers import ARCHITECTURES
from cdfkd_strategy.teachers import TeacherEnsemble
from cdfkd_strategy.types import ImageSpec, Needs


def architecture_name(architecture: str | Callable[[], nn.Module]) -> str:
    """The name that uploads are filed under; a user's own network never has the name of a registered one, which may be another network."""
    if isinstance(architecture, str):
        return architecture
    name = getattr(architecture, "__name__", "custom")
    return f"own {name}" if name in ARCHITECTURES else name


class Architectures:
    """Builds client networks by name; the default one may be the user's own.

    Args:
        default: the architecture of clients that do not name theirs: a registered name, or a function (or class)
            without arguments that gives the network.
        accepted: registered names that clients may name; None is the default alone.
        image: what the networks take.
        seed: of the common initialisation.

    Raises:
        UnknownNameError: a name is not registered.
        ArchitectureError: the default network does not give one logit per class for these images.
    """

    def __init__(self, default: str | Callable[[], nn.Module], accepted: Iterable[str] | None, image: ImageSpec, seed: int) -> None:
        if isinstance(default, nn.Module):
            raise ArchitectureError(
                f"the default architecture is a network, a {type(default).__name__}; accepted: a registered name, or what makes a network without arguments, "
                "such as its class"
            )
        self._build = None if isinstance(default, str) else default
        self.default = architecture_name(default)
        self.accepted = {ARCHITECTURES[name].name for name in (accepted or ())} | {self.default}
        self.declared = accepted is not None
        self.image = image
        self.seed = seed
        self._initial: dict[str, dict[str, Tensor]] = {}
        if isinstance(default, str):
            _ = ARCHITECTURES[default]
        self._check_default()

    @property
    def several(self) -> bool:
        """Did the user name more than one architecture? Then clients must be asked for theirs before round 1."""
        return self.declared and len(self.accepted) > 1

    def build(self, name: str | None) -> nn.Module:
        """A freshly initialised network, the same one every time.

        Raises:
            UploadError: the name is not accepted, or the network cannot take these images.
        """
        name = name or self.default
        if name not in self.accepted:
            raise UploadError(f"the client's architecture is {name[:60]!r}; accepted: {', '.join(sorted(self.accepted))}")
        try:
            if self._build is None or name != self.default:
                return initial_model(name, self.image, self.seed)
            with seeding.seeded_scope("init", self.seed, name):
                return self._build()
        except CDFKDError as error:
            raise UploadError(str(error)) from error

    def initial(self, name: str | None) -> dict[str, Tensor]:
        """The state dict of the common initialisation; also what uploads of this architecture are compared with."""
        name = name or self.default
        if name not in self._initial:
            self._initial[name] = {key: tensor.clone() for key, tensor in self.build(name).state_dict().items()}
        return self._initial[name]

    def load(self, name: str | None, state: dict[str, Tensor], *, mapped: bool = False) -> nn.Module:
        """The network with these weights, in eval mode; ``mapped`` leaves them where they are, and copies nothing."""
        model = self.build(name)
        model.load_state_dict(state, assign=mapped)
        return model.eval()

    @torch.no_grad()
    def try_out(self, name: str | None, state: dict[str, Tensor], needs: Needs, weights: str) -> None:
        """Use an upload once, before it is stored: what would end the distillation must not get that far.

        Args:
            name: its architecture.
            state: its weights, which fit the architecture.
            needs: of the method.
            weights: the competence estimate that will be asked of it, or "label_counts".

        Raises:
            UploadError: what a method looks at on noise is not finite, it lacks what the method needs, or its competence cannot be estimated.
        """
        teacher = TeacherEnsemble([self.load(name, state)], image=self.image)
        try:
            seen = teacher.observe(torch.randn(2, *self.image.shape, generator=seeding.generator("try out")))
            if weights in COMPETENCE:
                estimate(teacher, self.image, seeding.generator("try out"), weights)
        except (CDFKDError, RuntimeError) as error:
            raise UploadError(f"the network cannot be used as a teacher: {error}") from error
        looked_at = {"logits": seen.logits, "features": seen.features[0], "distances from its BatchNorm statistics": seen.bn[0]}
        for what, values in looked_at.items():
            if values is not None and not bool(torch.isfinite(values.sum())):
                raise UploadError(f"the network's {what} on random images are not finite; accepted: weights of ordinary size")
        if (needs.batch_norm and not all(teacher.has_batch_norm)) or (needs.features and not all(teacher.has_features)):
            raise UploadError(f"the method needs {', '.join(needs.disclosed())} of every teacher; a {name or self.default} does not have that")

    def start_from(self, arrays: ArrayRecord) -> None:
        """Take the user's weights as the default architecture's common initialisation.

        Raises:
            ArchitectureError: they do not fit it.
        """
        try:
            self._initial[self.default] = from_record(arrays, self.initial(self.default))
        except UploadError as error:
            raise ArchitectureError(
                f"initial_arrays do not fit the default architecture {self.default!r}: {error}; give an empty ArrayRecord() for a seeded one"
            ) from error

    def _check_default(self) -> None:
        try:
            model = self.build(self.default).eval()
            with torch.no_grad():
                logits = model(torch.zeros(2, *self.image.shape))
        except TypeError as error:
            what = f"the default architecture {self.default!r} cannot be made, or used"
            raise ArchitectureError(f"{what}: {error}; accepted: a class or function without arguments") from error
        except Exception as error:  # foreign code: whatever it raises, the answer is the same
            what = f"cannot take images of {self.image.shape}: {type(error).__name__}: {error}"
            raise ArchitectureError(f"the default architecture {self.default!r} {what}") from error
        found = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        if not isinstance(logits, Tensor) or logits.shape != (2, self.image.num_classes):
            raise ArchitectureError(
                f"the default architecture {self.default!r} gives {found} for one image; accepted: ({self.image.num_classes},), one logit per class"
            )
