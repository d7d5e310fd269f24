"""The loop of CDFKD-MFS as its paper reads: what the product's speed is measured against, and its mathematics compared with.

It has the habits of research code, on purpose: images in PyTorch's default layout; hooks that compute batch statistics in every
forward pass; teachers whose weights collect gradients that nobody uses; one backward pass through student and generator per
teacher. Losses and steps are those of `CDFKDMFS` (https://arxiv.org/abs/2205.11845), whose networks it takes, so that both can
start from the same state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFSConfig
from cdfkd_strategy.models.classifiers import final_linear
from cdfkd_strategy.models.generators import Generator
from cdfkd_strategy.models.multi_header import MultiHeaderStudent


class BatchStatistics:
    """A forward hook that keeps the distance of a BatchNorm layer's input from the layer's running statistics."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        self.distance = torch.zeros(())
        norm.register_forward_hook(self)

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        """Look at one batch."""
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = inputs[0].mean((0, 2, 3))
        variance = inputs[0].var((0, 2, 3), correction=0)
        self.distance = (mean - norm.running_mean).norm(2) + (variance - norm.running_var).norm(2)


class Features:
    """A forward hook that keeps the input of a teacher's last linear layer."""

    def __init__(self, teacher: nn.Module) -> None:
        self.value = torch.zeros(())
        linear = final_linear(teacher)
        assert linear is not None
        linear.register_forward_hook(self)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        """Look at one batch."""
        self.value = inputs[0]


class PlainMFS:
    """One student and one generator, five student steps and one generator step per iteration.

    Args:
        teachers: K classifiers; hooks are left on them.
        student: one header per teacher.
        generator: with ``latent_dim``.
        config: its weights, rates, batch size and steps; ``mode`` must be "paper" or "fused". The rates stay as they are set.
        rng: z is drawn from it.
        weights: class weights ``[K, C]`` of mode "fused".
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        student: MultiHeaderStudent,
        generator: Generator,
        config: CDFKDMFSConfig,
        rng: torch.Generator,
        weights: Tensor | None = None,
    ) -> None:
        self.teachers = [teacher.eval().requires_grad_(True) for teacher in teachers]
        self.student, self.generator, self.config, self.rng, self.weights = student.train(), generator.train(), config, rng, weights
        self.statistics = [[BatchStatistics(part) for part in teacher.modules() if isinstance(part, nn.BatchNorm2d)] for teacher in teachers]
        self.features = [Features(teacher) for teacher in teachers]
        self.student_optimizer = torch.optim.SGD(student.parameters(), config.student_lr, config.momentum, weight_decay=config.weight_decay)
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), config.generator_lr)

    def iteration(self) -> dict[str, float]:
        """The student's steps, then the generator's; gives the last step's losses by the product's names."""
        losses: dict[str, float] = {}
        for _ in range(self.config.student_steps):
            losses = self.student_step()
        for _ in range(self.config.generator_steps):
            losses |= self.generator_step()
        return losses

    def noise(self) -> Tensor:
        """``z [B, Z]`` on the generator's device."""
        z = torch.randn(self.config.batch_size, self.config.generator.latent_dim, generator=self.rng)
        return z.to(next(self.generator.parameters()).device)

    def fused(self, logits: Sequence[Tensor]) -> Tensor:
        """Log-probabilities ``[B, C]`` of K answers together, each class by its weights."""
        assert self.weights is not None
        return (sum(w * one.log_softmax(1) for w, one in zip(self.weights, logits, strict=True))).log_softmax(1)  # type: ignore[union-attr]

    def fused_kl(self, student: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """KL of the students together from the teachers together, in nats."""
        mine, theirs = self.fused(student), self.fused(teachers)
        return (theirs.exp() * (theirs - mine)).sum(1).mean()

    def student_step(self) -> dict[str, float]:
        """On a fresh batch."""
        config, count = self.config, len(self.teachers)
        with torch.no_grad():
            images = self.generator(self.noise())
            targets = [teacher(images) for teacher in self.teachers]
        outputs = self.student(images)
        head = feature = torch.zeros((), device=images.device)
        for k in range(count):
            head = head + (outputs.logits[k] - targets[k]).abs().mean() / count
            if config.feature_weight > 0:
                feature = feature + (outputs.features[k] - self.features[k].value).abs().sum(1).mean() / count
        terms = {"head_l1": config.head_weight * head}
        if config.feature_weight > 0:
            terms["feature_l1"] = config.feature_weight * feature
        if config.mode == "fused":
            terms["fused_kl"] = config.fused_weight * self.fused_kl(outputs.logits, targets)
        else:
            together = (sum(outputs.logits[k] for k in range(count)) / count - sum(targets) / count).abs().mean()  # type: ignore[union-attr]
            terms["ensemble_l1"] = config.ensemble_weight * together
        self.student_optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        self.student_optimizer.step()
        return {f"student/{name}": value.item() for name, value in terms.items()}

    def generator_step(self) -> dict[str, float]:
        """Through student and teachers, one backward pass per teacher, and one for what they say together."""
        config, count = self.config, len(self.teachers)
        self.generator_optimizer.zero_grad()
        images = self.generator(self.noise())
        outputs = self.student(images)
        adversarial = statistics = 0.0
        answers = []
        for k, teacher in enumerate(self.teachers):
            answers.append(teacher(images))
            disagreement = -(outputs.logits[k] - answers[k]).abs().mean() / count
            distances = [layer.distance for layer in self.statistics[k]]
            distance = config.bn_weight * (config.first_layer_weight * distances[0] + sum(distances[1:])) / count
            (disagreement + distance).backward(retain_graph=config.mode == "fused" or k < count - 1)
            adversarial += disagreement.item()
            statistics += distance.item()
        losses = {"generator/adversarial": adversarial, "generator/bn": statistics}
        if config.mode == "fused":
            mean = self.fused(answers).exp().mean(0)
            terms = {
                "fused_adversarial": -config.fused_weight * self.fused_kl(outputs.logits, answers),
                "balance": config.balance_weight * (mean * mean.log()).sum(),
            }
            sum(terms.values()).backward()  # type: ignore[union-attr]
            losses |= {f"generator/{name}": value.item() for name, value in terms.items()}
        self.generator_optimizer.step()
        return losses
