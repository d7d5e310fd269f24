"""SpaceshipNet: both halves of an epoch against a plain reference, the schedule, exchange, and students and teachers without maps."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cdfkd_strategy import seeding
from cdfkd_strategy.data.augmentation import AugmentName, RandomViews
from cdfkd_strategy.errors import ArchitectureError, ConfigError, NeedsError
from cdfkd_strategy.losses.activation_regions import activation_regions, multi_scale_difference
from cdfkd_strategy.methods.spaceshipnet import SpaceshipNet, SpaceshipNetConfig
from cdfkd_strategy.models.classifiers import build_classifier
from cdfkd_strategy.models.head_fusion import fuse
from cdfkd_strategy.models.multi_header import with_maps
from cdfkd_strategy.models.stages import with_stages
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teachers import TeacherEnsemble, state_hash
from cdfkd_strategy.types import ImageSpec, StudentOutputs
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble

SEED = "spaceshipnet test"


def build(
    count: int = 1, *, heads: int | None = None, teachers: TeacherEnsemble | None = None, student: nn.Module | None = None, **changes: Any
) -> SpaceshipNet:
    config = dataclasses.replace(SpaceshipNetConfig.toy(), **{"augment": "none", **changes})
    with seeding.seeded_scope(SEED):
        return SpaceshipNet(
            teachers or trained_ensemble(count),
            student or tiny_student(heads or count),
            config,
            image=DIGITS,
            rng=seeding.generator(SEED),
            runtime=Runtime(channels_last=False, threads=1),
        )


def random_weights(count: int) -> Tensor:
    weights = torch.rand(count, DIGITS.num_classes, generator=torch.Generator().manual_seed(0))
    return weights / weights.sum(0)


def walk(net: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[nn.BatchNorm2d, Tensor]]]:
    """Logits, both stages (what comes before each of the two poolings), and what enters the BatchNorm layers of a plain sequence of modules."""
    x, stages, inputs = images, [], []
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            inputs.append((module, x))
        if isinstance(module, nn.MaxPool2d):
            stages.append(x)
        x = module(x)
    return x, stages, inputs


# -- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_an_epoch_of_images_equals_a_plain_reference(augment: AugmentName) -> None:
    """Two teachers with weights, two epochs: G goes on, Adam begins anew, the losses are those of views, and the features those of the lowest loss."""
    weights = random_weights(2)
    changes = {"first_layer_weight": 2.0, "bn_weight": 0.3, "generator_steps": 4, "pool_size": 32, "augment": augment}
    distiller = build(2, teachers=trained_ensemble(2, weights), **changes)
    generator, rng = copy.deepcopy(distiller.generator).train(), seeding.generator(SEED)
    views = RandomViews(DIGITS, augment, 1, rng)
    for epoch in range(2):
        found = distiller._synthesise()
        z = torch.randn(16, 16, generator=rng)
        adam = torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.999))
        best, terms, features = float("inf"), [], []
        for _ in range(4):
            x = generator.project(z).view(-1, *generator.start)
            hidden = []
            for index, module in enumerate(generator.body):
                x = module(x)
                if index in (0, 4, 8):
                    hidden.append(x.detach().clone())
            x = views.crop(x)
            entropy, distance = torch.zeros(()), torch.zeros(())
            for k, net in enumerate(distiller.teachers.nets):
                logits, _, inputs = walk(net, x)
                for b in range(16):
                    entropy = entropy - weights[k, b % 10] * torch.log_softmax(logits[b], dim=0)[b % 10] / 16
                for layer, (norm, values) in enumerate(inputs):
                    rows = values.transpose(0, 1).flatten(1)
                    shift = (rows.mean(1) - norm.running_mean).norm() + (rows.var(1, correction=0) - norm.running_var).norm()
                    distance = distance + (2.0 if layer == 0 else 1.0) * shift / 2
            loss = 0.5 * entropy + 0.3 * distance
            if loss.item() < best:
                best, terms, features = loss.item(), [(0.5 * entropy).item(), (0.3 * distance).item()], hidden
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert [value.item() for value in found.values()] == pytest.approx(terms, rel=1e-3)
        for layer, here in enumerate(features):
            rows = distiller.features.state_dict()[str(layer)]["rows"]
            assert rows.shape == (16 * (epoch + 1), here[0].numel())
            torch.testing.assert_close(rows[-16:], here.flatten(1), rtol=1e-2, atol=1e-3)


def test_exchanged_images_come_from_both_and_plain_ones_are_the_generators() -> None:
    distiller = build(exchange_probability=0.0, pool_size=16)
    distiller._synthesise()
    with torch.no_grad():
        distiller.generator.eval()
        rng = torch.Generator().manual_seed(3)
        found = distiller._draw(16, rng)
        layer = int(torch.randint(3, (1,), generator=torch.Generator().manual_seed(3)))
        rows = distiller.features.state_dict()[str(layer)]["rows"]
        images = distiller.generator.body[(1, 5, 9)[layer] :](rows.view(16, *distiller.features.shapes[layer]))
    assert sorted(found.sum(dim=(1, 2, 3)).tolist()) == pytest.approx(sorted(images.sum(dim=(1, 2, 3)).tolist()), abs=1e-4)
    distiller.config = dataclasses.replace(distiller.config, exchange_probability=1.0)
    exchanged = distiller._draw(16, torch.Generator().manual_seed(3))
    assert (exchanged - found).abs().max() > 0.01
    assert distiller.sample(40, torch.Generator()).shape == (40, *DIGITS.shape)  # type: ignore[union-attr]


# -- the student ---------------------------------------------------------------------------------------------------


def region(logit_sum: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """Grad-CAM without ReLU, image by image and channel by channel."""
    gradients = torch.autograd.grad(logit_sum, maps, retain_graph=True)
    found = []
    for gradient, here in zip(gradients, maps, strict=True):
        images = []
        for slope, image in zip(gradient, here, strict=True):
            images.append(sum(slope[c].mean().item() * image[c] for c in range(len(image))))
        found.append(torch.stack(images))
    return found


def plain_terms(student: nn.Module, nets: list[nn.Module], weights: Tensor, images: Tensor, temperature: float) -> list[Tensor]:
    """L_S with the weights 1, for headers that belong to teachers, and for one header of the ensemble."""
    images = images.clone().requires_grad_()
    maps = list(student.trunk(images))
    logits = student._answers(student._narrowed(maps)).logits
    seen = [walk(net, images)[:2] for net in nets]
    pool = torch.log_softmax(sum(weights[k] * torch.log_softmax(said, dim=1) for k, (said, _) in enumerate(seen)), dim=1)
    kl, scales, cams = torch.zeros(()), torch.zeros(()), torch.zeros(())
    targets = [pool] if len(logits) == 1 else [said for said, _ in seen]
    for mine, theirs in zip(logits, targets, strict=True):
        p = torch.softmax(theirs.detach() / temperature, dim=1)
        q = torch.softmax(mine / temperature, dim=1)
        kl = kl + temperature**2 * (p * torch.log(p / q)).mean() / len(logits)  # over classes too
    for k, (said, stages) in enumerate(seen):
        head = 0 if len(logits) == 1 else k
        labels = (pool if len(logits) == 1 else said).argmax(1).tolist()
        ours = region(sum(logits[head, b, y] for b, y in enumerate(labels)), maps)
        other = region(sum(said[b, y] for b, y in enumerate(labels)), stages)
        for b, y in enumerate(labels):
            share = float(weights[k, y]) if len(logits) == 1 else 1 / len(nets)
            for one, two in zip(ours, other, strict=True):
                scales = scales + share * ((one[b] - two[b].detach()) ** 2).mean() / len(images)
            area = ours[-1][b].numel()
            cams = cams + share * ((area * ours[-1][b] - area * other[-1][b].detach()) ** 2).mean() / len(images)
    return [kl, scales, cams]


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_student_step_equals_a_plain_reference(heads: int, augment: AugmentName) -> None:
    """Losses on views, and the student after one step of SGD."""
    weights = random_weights(2)
    changes = {"temperature": 7.0, "scales_weight": 0.6, "cam_weight": 0.02, "weight_decay": 0.0, "augment": augment}
    distiller = build(2, heads=heads, teachers=trained_ensemble(2, weights), **changes)
    distiller._synthesise()
    student, rng = copy.deepcopy(distiller.student).train(), torch.Generator()
    rng.set_state(distiller.rng.get_state())
    images = RandomViews(DIGITS, augment, 1, rng).crop(distiller._draw(16, rng))
    distiller.student.train()
    found = distiller._student_step()
    kl, scales, cams = plain_terms(student, list(distiller.teachers.nets), weights, images, 7.0)
    assert [value.item() for value in found.values()] == pytest.approx([kl.item(), 0.6 * scales.item(), 0.02 * cams.item()], rel=1e-3)
    assert list(found) == ["student/kl", "student/regions", "student/cam"]
    gradients = torch.autograd.grad(kl + 0.6 * scales + 0.02 * cams, list(student.parameters()))
    for parameter, gradient, moved in zip(student.parameters(), gradients, distiller.student.parameters(), strict=True):
        torch.testing.assert_close(moved, parameter - 0.02 * gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "same"), [("resnet8", True), ("wrn16_1", False)])
def test_the_map_of_a_class_is_that_of_the_last_layers_weights_where_only_a_mean_lies_between(name: str, same: bool) -> None:
    """In a WideResNet BatchNorm and ReLU lie between, too; the docstring says so."""
    image = ImageSpec(3, 32, 32, 5)
    with seeding.seeded_scope(SEED):
        net = build_classifier(name, image).eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, 0, 0.3)
        images = torch.randn(4, 3, 32, 32)
    logits, maps = with_stages(net, image)(images)
    assert logits.requires_grad
    classes = logits.argmax(-1)
    area = maps[-1].shape[2] * maps[-1].shape[3]
    mine = area * activation_regions(logits, classes, maps)[-1].detach()
    theirs = torch.einsum("bc,bchw->bhw", net.classifier.weight[classes], maps[-1]).detach()  # type: ignore[index]
    assert (float((mine - theirs).abs().max() / theirs.abs().max()) < 1e-5) == same


def test_without_weight_there_are_no_regions_and_any_student_will_do() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> StudentOutputs:
            return StudentOutputs(self.linear(x.flatten(1))[None], x.flatten(1)[None])

    assert "student/cam" not in build(student=Flat(), scales_weight=0.0, cam_weight=0.0).run_epoch(0)
    with pytest.raises(ArchitectureError, match="gives no stage maps"):
        build(student=Flat(), scales_weight=0.0)


def test_the_generator_stays_while_the_student_learns_and_the_student_while_images_are_made() -> None:
    distiller = build()
    before = state_hash(distiller.student.state_dict())
    distiller._synthesise()
    assert state_hash(distiller.student.state_dict()) == before
    generator = state_hash(distiller.generator.state_dict())
    distiller._student_step()
    assert state_hash(distiller.generator.state_dict()) == generator
    assert state_hash(distiller.student.state_dict()) != before


# -- the schedule --------------------------------------------------------------------------------------------------


def test_steps_rates_and_pool_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(epochs=4, generator_steps=3, synthesis_batch=20, pool_size=50, student_steps=5, batch_size=8, student_lr=0.1)
    calls: list[str] = []
    rates: list[float] = []
    image_loss, step = distiller.image_loss, distiller.student_optimizer.step
    monkeypatch.setattr(distiller, "image_loss", lambda *given: (calls.append("images"), image_loss(*given))[1])
    monkeypatch.setattr(
        distiller.student_optimizer,
        "step",
        lambda: (calls.append("student"), rates.append(distiller.student_optimizer.param_groups[0]["lr"]), step())[2],
    )
    assert distiller.num_epochs == 4
    assert distiller.sample(3, torch.Generator()) is None
    for epoch, (stored, rate) in enumerate(((20, 0.1), (40, 0.0853553), (50, 0.05), (50, 0.0146447))):
        calls.clear()
        rates.clear()
        distiller.run_epoch(epoch)
        assert calls == ["images"] * 3 + ["student"] * 5
        assert rates == pytest.approx([rate] * 5, rel=1e-5)
        assert len(distiller.features) == stored


def test_exchange_happens_as_often_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = build(exchange_probability=0.7, batch_size=2)
    distiller._synthesise()
    counted: list[Tensor] = []
    monkeypatch.setattr("cdfkd_strategy.methods.spaceshipnet.exchange_channels", lambda features, rng: (counted.append(features), features)[1])
    for _ in range(300):
        distiller._draw(2, distiller.rng)
    assert 180 < len(counted) < 240
    shapes = [tuple(features.shape[1:]) for features in counted]
    assert all(shapes.count(shape) > 40 for shape in distiller.features.shapes), "all three layers take part"


# -- students, teachers and settings -------------------------------------------------------------------------------


class Untraceable(nn.Module):
    """Its control flow depends on values, so that its stages cannot be found."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() < 1e9 else self.net(-x)


def test_teachers_without_stages_are_left_out_of_the_regions() -> None:
    traced, other = trained_ensemble(2).nets
    mixed = build(2, teachers=TeacherEnsemble([traced, Untraceable(other)], image=DIGITS))
    assert "student/regions" in mixed.run_epoch(0)
    alone = build(teachers=TeacherEnsemble([Untraceable(other)], image=DIGITS))
    assert list(alone.run_epoch(0)) == ["images/cross_entropy", "images/bn", "student/kl"]


def test_one_header_compares_regions_with_all_the_weight_of_those_teachers_that_have_them() -> None:
    traced, other = trained_ensemble(2).nets
    distiller = build(2, heads=1, teachers=TeacherEnsemble([traced, Untraceable(other)], random_weights(2), image=DIGITS))
    images = torch.randn(8, *DIGITS.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    teachers = distiller.teachers.observe(images, bn=False, maps=True)
    student, maps = with_maps(distiller.student).observe(images)
    classes = fuse(teachers.logits.detach(), distiller.teachers.weights).argmax(-1)
    mine, theirs = activation_regions(student.logits[0], classes, maps), activation_regions(teachers.logits[0], classes, teachers.maps[0])
    found, _ = distiller._region_differences(student.logits, maps, teachers)
    assert found.item() == pytest.approx(multi_scale_difference(mine, theirs).mean().item(), rel=1e-5)


def test_two_headers_for_three_teachers_are_an_error() -> None:
    with pytest.raises(ArchitectureError, match="2 headers for 3 teachers"):
        build(3, heads=2).run_epoch(0)


def test_regions_are_the_same_if_activations_are_computed_anew() -> None:
    found = []
    for recompute in (False, True):
        distiller = build(2)
        distiller.runtime = dataclasses.replace(distiller.runtime, recompute=recompute)
        with distiller.teachers.prepared(distiller.runtime):
            found.append(distiller.run_epoch(0))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_batch_norm_statistics_are_disclosed_and_needed() -> None:
    assert SpaceshipNet.needs.disclosed() == ("batch_norm",)
    with pytest.raises(NeedsError, match="BatchNorm running statistics"):
        build(teachers=trained_ensemble(1, group_norm=True))


def test_the_defaults_are_the_authors_for_cifar() -> None:
    config = SpaceshipNetConfig()
    assert (config.epochs, config.generator_steps, config.student_steps, config.synthesis_batch, config.batch_size) == (200, 200, 2000, 256, 256)
    assert (config.generator_lr, config.student_lr, config.momentum, config.weight_decay) == (1e-3, 0.1, 0.9, 1e-4)
    assert (config.label_weight, config.bn_weight, config.first_layer_weight, config.scales_weight, config.cam_weight) == (0.5, 1.0, 1.0, 1.0, 1.0)
    assert (config.exchange_probability, config.temperature, config.padding, config.generator.latent_dim) == (0.7, 30.0, 4, 256)
    assert (config.generator.output, config.generator.batch_norm_eps) == ("sigmoid", 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 1}, "batch_size is 1"),
        ({"cam_weight": -1.0}, "cam_weight is -1"),
        ({"exchange_probability": 1.5}, "exchange_probability is 1.5; accepted: at least 0 and at most 1"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SpaceshipNetConfig(), **change)
