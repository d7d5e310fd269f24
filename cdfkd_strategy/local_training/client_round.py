"""How a client trains its teacher: plain SGD on its own images, one CPU thread, the same bits in every process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from cdfkd_strategy import freed_memory
from cdfkd_strategy.config import require
from cdfkd_strategy.data.client_share import ClientShare
from cdfkd_strategy.errors import ArchitectureError, CDFKDError, ConfigError, DataError
from cdfkd_strategy.losses.divergence import kl_divergence
from cdfkd_strategy.models.head_fusion import FusedStudent
from cdfkd_strategy.schedules import cosine, multistep
from cdfkd_strategy.seeding import generator, seeded_scope, threads
from cdfkd_strategy.types import ImageSpec


@dataclass(frozen=True)
class ClientsConfig:
    """The clients of a run and how each of them trains.

    Args:
        count: number of clients.
        architectures: teacher architectures; client ``k`` takes number ``k`` modulo their count.
        epochs: local epochs per round.
        batch_size: images per step; a last batch of one image joins the one before it.
        optimizer: "sgd", or "adam" with its default betas.
        lr: at the start of every round.
        momentum: of SGD.
        weight_decay: on all parameters.
        schedule: ``cosine`` anneals the rate to 0 over the round, step by step; ``multistep`` lowers it at ``milestones``.
        milestones: epochs (of the round, from 0) at which ``multistep`` divides the rate by 10.
        milestone_rates: the rates from the milestones on, where they are other ones; empty, or one per milestone.
        init: do clients of one architecture start from a "common" initialisation, or each from its "own" (as papers without clients do)?
            The latter is for `cdfkd teachers` and `cdfkd bench`: with Flower it is the server that sends the initial weights.
        device: where `cdfkd teachers` and `cdfkd bench` train: a torch device string. A Flower client's device is in its node's configuration.
        augment: ``shift`` (random crop after zero padding by an eighth of the side), ``flip`` (horizontal), both, or none.
        fedprox_mu: weight of FedProx's ``mu/2 ||w - w_received||^2`` (arXiv:1812.06127, eq. 2); 0 is off.
        student_weight: weight of ``T^2 KL(student || teacher)`` on the client's images once a student was broadcast; 0 is off.
        student_term: classes of that KL: ``not_true`` leaves out each image's own label on both sides (FedNTD,
            arXiv:2106.03097), so that the student cannot teach what the client knows better; with two classes nothing is
            left of it. ``all`` is plain distillation, which loses accuracy over the rounds (`simulations/LOG.md`).
        student_temperature: ``T`` of that term.
        attention_samples: own images on which a client fits the attention over heads, at most.
        num_cpus: what Flower's simulation reserves for a client; training itself always uses one thread.

    Raises:
        ConfigError: a value is outside what is accepted.
    """

    count: int = 4
    architectures: tuple[str, ...] = ("small_cnn",)
    epochs: int = 5
    batch_size: int = 64
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    milestones: tuple[int, ...] = ()
    milestone_rates: tuple[float, ...] = ()
    init: Literal["common", "own"] = "common"
    device: str = "cpu"
    augment: Literal["none", "shift", "flip", "crop_flip"] = "none"
    fedprox_mu: float = 0.0
    student_weight: float = 1.0
    student_term: Literal["not_true", "all"] = "not_true"
    student_temperature: float = 1.0
    attention_samples: int = 300
    num_cpus: int = 1

    def __post_init__(self) -> None:
        if not self.architectures:
            raise ConfigError("clients.architectures is empty; accepted: at least one architecture name")
        require(self, "clients", "count", "epochs", "num_cpus", least=1)
        require(self, "clients", "batch_size", least=2, why="BatchNorm needs two images")
        require(self, "clients", "lr", "milestone_rates", "student_temperature", above=0)
        require(self, "clients", "milestones", "attention_samples", "momentum", "weight_decay", "fedprox_mu", "student_weight", least=0)
        if self.milestone_rates and len(self.milestone_rates) != len(self.milestones):
            raise ConfigError(f"clients.milestone_rates are {len(self.milestone_rates)} for {len(self.milestones)} milestones; accepted: as many, or none")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ConfigError(f"clients.device is {self.device!r}; accepted: cpu, cuda, cuda:<n>") from error

    def architecture(self, partition_id: int) -> str:
        """The architecture of client ``partition_id``."""
        return self.architectures[partition_id % len(self.architectures)]


def train_teacher(
    model: nn.Module,
    share: ClientShare,
    *,
    image: ImageSpec,
    config: ClientsConfig,
    seed: int,
    partition_id: int,
    round: int,  # noqa: A002 - Flower's word
    student: FusedStudent | None = None,
) -> dict[str, float]:
    """Train a teacher in place for one round and leave it in eval mode.

    Cross-entropy, plus the student term from the second round on. One CPU thread, and all random numbers from
    (seed, partition id, round): on one machine the result has the same bits in every process.

    Args:
        model: what the server sent, on the device to train on.
        share: the client's images and labels.
        image: normalisation of the pixels.
        config: optimiser, epochs, terms.
        seed: of the run.
        partition_id: which client this is.
        round: from 1.
        student: the broadcast student; pixels in, log-probabilities (or logits) out.

    Returns:
        Means over the last epoch: ``loss`` (cross-entropy, nats), ``accuracy`` on the training images, ``student_kl``
        if there is a student term; and ``num_examples``, ``steps``.

    Raises:
        DataError: fewer than two images.
        ArchitectureError: nothing to train in the model.
        CDFKDError: the loss is not finite any more.
    """
    if len(share.x_train) < 2:
        raise DataError(
            f"client {partition_id} has {len(share.x_train)} training images; accepted: at least 2; raise partition.min_samples or lower data.local_test"
        )
    with threads(1), freed_memory.kept(), seeded_scope("client", seed, partition_id, round), torch.enable_grad():
        run = _Run(model, share, image, config, student if config.student_weight > 0 else None)
        order = generator("client-order", seed, partition_id, round)
        model.train().to(memory_format=torch.channels_last)  # a quarter to a third faster on a CPU
        try:
            for epoch in range(config.epochs):
                terms = run.epoch(order)
                if not math.isfinite(sum(terms.values())):
                    raise CDFKDError(
                        f"client {partition_id}, round {round}: the training loss is not finite in epoch {epoch + 1} of {config.epochs}; "
                        f"lower clients.lr (now {config.lr}), or check the images"
                    )
        finally:
            model.eval().to(memory_format=torch.contiguous_format)
    return {**terms, "num_examples": float(len(share.x_train)), "steps": float(run.step)}


class _Run:
    """One round of one client: model, optimiser and step counter."""

    def __init__(self, model: nn.Module, share: ClientShare, image: ImageSpec, config: ClientsConfig, student: FusedStudent | None) -> None:
        self.model, self.share, self.image, self.config, self.student = model, share, image, config, student
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ArchitectureError("the model to train has no parameters that require gradients; call model.requires_grad_(True)")
        self.received = [parameter.detach().clone() for parameter in self.parameters] if config.fedprox_mu > 0 else []
        self.device = self.parameters[0].device
        self.optimiser: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimiser = torch.optim.Adam(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        else:
            self.optimiser = torch.optim.SGD(self.parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        self.augment = augmentation(config.augment, image)
        self.known = None if student is None or config.augment != "none" else self._student_on_all(student)
        self.step = 0
        self.total_steps = config.epochs * len(cut_batches(torch.arange(len(share.x_train)), config.batch_size))

    def epoch(self, order: torch.Generator) -> dict[str, float]:
        """One pass over the images; sums of the terms, divided by the images."""
        sums: dict[str, float] = {}
        for chosen in cut_batches(torch.randperm(len(self.share.x_train), generator=order), self.config.batch_size):
            for name, value in self._train(chosen).items():
                sums[name] = sums.get(name, 0.0) + value * len(chosen)
        return {name: value / len(self.share.x_train) for name, value in sums.items()}

    def _student_on_all(self, student: FusedStudent) -> Tensor:
        """The student's log-probabilities ``[N, C]`` on all images: without augmentation they are the same in every epoch."""
        with torch.no_grad():
            batches = self.share.x_train.split(self.config.batch_size)
            return torch.cat([student(pixels.to(self.device).float() / 255) for pixels in batches])

    def _train(self, chosen: Tensor) -> dict[str, float]:
        """One step on a batch of the client's images, by their indices ``[B]``."""
        images = self.augment(self.share.x_train[chosen]).to(self.device).float() / 255
        labels = self.share.y_train[chosen].to(self.device)
        logits = self.model(self.image.normalise(images))
        loss = F.cross_entropy(logits, labels)
        terms = {"loss": loss.detach(), "accuracy": (logits.detach().argmax(1) == labels).float().mean()}
        if self.student is not None:
            with torch.no_grad():
                target = self.student(images) if self.known is None else self.known[chosen.to(self.device)]
            terms["student_kl"] = self._distance(logits, target, labels)
            loss = loss + self.config.student_weight * terms["student_kl"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._pull()
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        self.optimiser.step()
        self.step += 1
        return {name: float(value.detach()) for name, value in terms.items()}

    def _distance(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """``T^2 KL(student || teacher)`` over all classes or those that are not the label, batch mean in nats; the student is the target."""
        if self.config.student_term == "not_true":
            logits, target = not_true(logits, labels), not_true(target, labels)
        return kl_divergence(logits, target, self.config.student_temperature)

    def _pull(self) -> None:
        """Add the gradient of FedProx's term, ``mu (w - w_received)``; without the term nothing was kept to pull to."""
        for parameter, origin in zip(self.parameters, self.received, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=self.config.fedprox_mu)

    def _rate(self) -> float:
        if self.config.schedule == "constant":
            return self.config.lr
        if self.config.schedule == "multistep":
            epoch, milestones = self.step * self.config.epochs // self.total_steps, self.config.milestones
            passed = sum(epoch >= milestone for milestone in milestones)
            return self.config.milestone_rates[passed - 1] if passed and self.config.milestone_rates else self.config.lr * multistep(epoch, milestones)
        return self.config.lr * cosine(self.step, self.total_steps)


def not_true(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits ``[B, C]`` without each image's label: ``[B, C - 1]``."""
    keep = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    return logits[keep].view(len(logits), -1)


def augmentation(name: str, image: ImageSpec) -> Callable[[Tensor], Tensor]:
    """Transforms of torchvision, drawn anew for every image of a uint8 batch ``[B, channels, H, W]``.

    They draw from torch's global random state. A v2 transform on a whole batch would move all its images alike.
    """
    crop = v2.RandomCrop((image.height, image.width), padding=max(max(image.height, image.width) // 8, 1))
    flip = v2.RandomHorizontalFlip()
    if name == "none":
        return lambda batch: batch
    transform = v2.Compose({"shift": [crop], "flip": [flip], "crop_flip": [crop, flip]}[name])
    return lambda batch: torch.stack([transform(picture) for picture in batch])


def cut_batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """Cut an order into batches; BatchNorm cannot train on one image, so a last one joins the batch before."""
    batches = list(torch.split(order, batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches
