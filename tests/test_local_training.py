from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdfkd_strategy.child_process import end_with_parent
from cdfkd_strategy.data.client_share import ClientShare, client_share
from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.data.image_data import ImageData
from cdfkd_strategy.data.partition import PartitionConfig
from cdfkd_strategy.errors import ArchitectureError, CDFKDError, ConfigError, DataError
from cdfkd_strategy.local_training import ClientsConfig, Trained, initial_model, train_all, train_teacher
from cdfkd_strategy.local_training.client_round import augmentation, cut_batches
from cdfkd_strategy.models.head_fusion import FusedStudent
from cdfkd_strategy.models.multi_header import MultiHeaderStudent
from cdfkd_strategy.seeding import generator, seeded_scope, threads
from cdfkd_strategy.teachers import state_hash
from cdfkd_strategy.types import ImageSpec

IMAGE = ImageSpec(1, 8, 8, 3, (0.4,), (0.3,))


def share(count: int, seed: int = 0) -> ClientShare:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=rng)
    pixels = torch.randint(0, 120, (count, 1, 8, 8), generator=rng)
    pixels[torch.arange(count), 0, labels * 2] += 130  # the class is a bright row
    return ClientShare(pixels.to(torch.uint8), labels, pixels[:0].to(torch.uint8), labels[:0])


def tiny_data(count: int = 120) -> ImageData:
    images, labels, _, _ = share(count)
    return ImageData(images, labels, images[:9], labels[:9], ("a", "b", "c"), IMAGE)


def fused_student(seed: int = 0) -> FusedStudent:
    with seeded_scope("test-student", seed):
        return FusedStudent(MultiHeaderStudent("lenet", 2, IMAGE))


def trained(
    config: ClientsConfig, *, arch: str = "lenet", images: ClientShare | None = None, number: int = 1, **more: object
) -> tuple[nn.Module, dict[str, float]]:
    model = initial_model(arch, IMAGE, seed=0)
    stats = train_teacher(model, images or share(50), image=IMAGE, config=config, seed=0, partition_id=2, round=number, **more)  # type: ignore[arg-type]
    return model, stats


def reference(config: ClientsConfig, images: ClientShare, student: FusedStudent | None) -> nn.Module:
    """The whole loss written down and differentiated at once; torch's own scheduler; round 2 of client 2."""
    model = initial_model("lenet", IMAGE, seed=0).train()
    received = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(images.y_train) // config.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = generator("client-order", 0, 2, 2)
    for _ in range(config.epochs):
        shuffled = torch.randperm(len(images.y_train), generator=order)
        for start in range(0, len(shuffled), config.batch_size):
            batch = shuffled[start : start + config.batch_size]
            pixels = images.x_train[batch].float() / 255
            logits = model((pixels - 0.4) / 0.3)
            probabilities = logits.softmax(1)
            loss = -probabilities[torch.arange(len(batch)), images.y_train[batch]].log().mean()
            loss = loss + config.fedprox_mu / 2 * sum((p - q).square().sum() for p, q in zip(model.parameters(), received, strict=True))
            if student is not None:
                temperature = config.student_temperature
                target = (student(pixels) / temperature).detach().exp()
                ours = (logits / temperature).exp()
                kl = torch.zeros(())
                for mine, theirs, label in zip(ours, target, images.y_train[batch].tolist(), strict=True):
                    classes = [c for c in range(IMAGE.num_classes) if config.student_term == "all" or c != label]
                    for c in classes:
                        q, p = theirs[c] / theirs[classes].sum(), mine[c] / mine[classes].sum()
                        kl = kl + q * (q / p).log() / len(batch)
                loss = loss + config.student_weight * temperature**2 * kl
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scheduler.step()
    return model


@pytest.mark.parametrize(
    ("terms", "with_student"),
    [
        ({}, False),
        ({"fedprox_mu": 0.5}, False),
        ({"student_weight": 0.7, "student_temperature": 2.0}, True),
        ({"student_weight": 0.7, "student_temperature": 2.0, "student_term": "all"}, True),
        ({"fedprox_mu": 0.3}, True),
    ],
)
def test_training_is_what_the_formulas_say(terms: dict[str, float], with_student: bool) -> None:
    config = ClientsConfig(epochs=2, batch_size=16, lr=0.05, **terms)  # type: ignore[arg-type]
    student = fused_student() if with_student else None
    model, _ = trained(config, number=2, student=student)
    expected = reference(config, share(50), student)
    before = initial_model("lenet", IMAGE, seed=0)
    for (name, got), want, start in zip(model.named_parameters(), expected.parameters(), before.parameters(), strict=True):
        assert torch.allclose(got, want, atol=1e-5), name
        assert not torch.allclose(got, start, atol=1e-4), name


def test_every_term_changes_the_result() -> None:
    student = fused_student()
    variants: list[tuple[dict[str, object], FusedStudent | None]] = [
        ({}, None),
        ({"fedprox_mu": 0.5}, None),
        ({}, student),
        ({"student_temperature": 3.0}, student),
        ({"student_term": "all"}, student),
        ({"schedule": "constant"}, None),
        ({"augment": "shift"}, None),
        ({"augment": "flip"}, None),
        ({"augment": "crop_flip"}, None),
    ]
    hashes = [state_hash(trained(ClientsConfig(epochs=1, batch_size=16, **terms), student=given)[0].state_dict()) for terms, given in variants]  # type: ignore[arg-type]
    assert len(set(hashes)) == len(variants)
    off = trained(ClientsConfig(epochs=1, batch_size=16, student_weight=0.0), student=student)[0]
    assert state_hash(off.state_dict()) == hashes[0]


def test_it_learns_and_says_so() -> None:
    model, stats = trained(ClientsConfig(epochs=15, batch_size=16, lr=0.02), arch="lenet_bn", images=share(200))
    assert not model.training
    with torch.no_grad():
        held_out = share(300, seed=1)
        right = (model(IMAGE.normalise(held_out.x_train.float() / 255)).argmax(1) == held_out.y_train).float().mean()
    assert right > 0.9
    assert stats["accuracy"] > 0.9
    assert set(stats) == {"loss", "accuracy", "num_examples", "steps"}
    assert (stats["num_examples"], stats["steps"]) == (200, 15 * 13)
    _, with_student = trained(ClientsConfig(epochs=1), student=fused_student())
    assert with_student["student_kl"] > 0


def test_the_student_is_left_as_it_was() -> None:
    student = fused_student()
    before = state_hash(student.state_dict())
    trained(ClientsConfig(epochs=1), student=student)
    assert state_hash(student.state_dict()) == before
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize(("augment", "times"), [("none", 1), ("flip", 3)])
def test_images_that_do_not_change_are_shown_to_the_student_once(augment: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = FusedStudent.forward
    monkeypatch.setattr(FusedStudent, "forward", lambda self, images: seen.append((len(images), torch.get_num_threads())) or forward(self, images))
    with threads(2):
        trained(ClientsConfig(epochs=3, batch_size=16, augment=augment), student=fused_student())  # type: ignore[arg-type]
    assert sum(count for count, _ in seen) == 50 * times
    assert {used for _, used in seen} == {1}, "the same bits in every process"


def test_seed_client_and_round_decide_and_nothing_else() -> None:
    config = ClientsConfig(epochs=1, batch_size=16, augment="crop_flip")

    def run(seed: int, client: int, number: int) -> str:
        model = initial_model("lenet", IMAGE, seed=0)
        train_teacher(model, share(50), image=IMAGE, config=config, seed=seed, partition_id=client, round=number)
        return state_hash(model.state_dict())

    torch.manual_seed(1)
    first = run(0, 0, 1)
    torch.manual_seed(2)
    position = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        assert run(0, 0, 1) == first
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), position)
    assert len({first, run(1, 0, 1), run(0, 1, 1), run(0, 0, 2)}) == 4


def test_every_step_runs_on_one_thread_with_the_model_in_training() -> None:
    model, seen = initial_model("lenet", IMAGE, seed=0), []
    model.register_forward_hook(lambda module, inputs, output: seen.append((torch.get_num_threads(), module.training)))
    torch.set_num_threads(2)
    try:
        train_teacher(model, share(20), image=IMAGE, config=ClientsConfig(epochs=1, batch_size=10), seed=0, partition_id=0, round=1)
    finally:
        torch.set_num_threads(1)
    assert seen == [(1, True)] * 2


@pytest.mark.parametrize(("count", "sizes"), [(33, [16, 17]), (34, [16, 16, 2]), (1, [1]), (16, [16]), (17, [17]), (5, [5])])
def test_a_last_batch_of_one_joins_the_one_before(count: int, sizes: list[int]) -> None:
    batches = cut_batches(torch.arange(count), 16)
    assert [len(batch) for batch in batches] == sizes
    assert torch.cat(batches).tolist() == list(range(count))


@pytest.mark.parametrize("arch", ["lenet_bn", "small_cnn", "small_cnn_gn"])
def test_batch_norm_survives_every_share_size(arch: str) -> None:
    for count in (2, 5, 9):
        model, stats = trained(ClientsConfig(epochs=1, batch_size=4), arch=arch, images=share(count))
        assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
        assert stats["num_examples"] == count


def test_too_little_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match=r"client 2 has 1 training images; accepted: at least 2"):
        trained(ClientsConfig(), images=share(1))
    frozen = initial_model("lenet", IMAGE, seed=0).requires_grad_(False)
    with pytest.raises(ArchitectureError, match="requires_grad_"):
        train_teacher(frozen, share(5), image=IMAGE, config=ClientsConfig(), seed=0, partition_id=0, round=1)


def test_a_diverging_client_says_which_and_what_to_do() -> None:
    with pytest.raises(CDFKDError, match=r"client 2, round 1: .* lower clients\.lr \(now 1e\+20\)"):
        trained(ClientsConfig(epochs=3, batch_size=16, lr=1e20))


def one_pixel(count: int = 200) -> Tensor:
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 4, 2] = 255
    return pixels


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("none", {4}, {2}), ("shift", {3, 4, 5}, {1, 2, 3}), ("flip", {4}, {2, 5}), ("crop_flip", {3, 4, 5}, {1, 2, 3, 4, 5, 6})],
)
def test_augmentation_moves_every_image_on_its_own(name: str, rows: set[int], columns: set[int]) -> None:
    with seeded_scope("test"):
        moved = augmentation(name, IMAGE)(one_pixel())
    assert (moved.shape, moved.dtype) == ((200, 1, 8, 8), torch.uint8)
    places = moved[:, 0].nonzero()
    assert len(places) == 200
    assert set(places[:, 1].tolist()) == rows
    assert set(places[:, 2].tolist()) == columns


def test_initialisation_is_common_to_an_architecture() -> None:
    first = state_hash(initial_model("lenet", IMAGE, seed=0).state_dict())
    torch.manual_seed(5)
    assert state_hash(initial_model("lenet", IMAGE, seed=0).state_dict()) == first
    assert state_hash(initial_model("lenet", IMAGE, seed=1).state_dict()) != first


def test_architectures_go_round() -> None:
    config = ClientsConfig(count=3, architectures=("lenet", "small_cnn"))
    assert [config.architecture(client) for client in range(3)] == ["lenet", "small_cnn", "lenet"]


@pytest.mark.parametrize(
    "bad", [{"architectures": ()}, {"count": 0}, {"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"momentum": -1.0}, {"student_temperature": 0.0}]
)
def test_bad_settings_say_what_is_accepted(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="accepted"):
        ClientsConfig(**bad)  # type: ignore[arg-type]


# -- all clients of round 1 ------------------------------------------------------------------------------------

ALL = ClientsConfig(count=3, architectures=("lenet_bn", "small_cnn_gn"), epochs=1, batch_size=16, augment="crop_flip")
DEALT = DataConfig(partition=PartitionConfig(name="iid"))


def test_processes_give_the_bits_of_training_here() -> None:
    data = tiny_data()
    done: list[int] = []
    results = train_all(ALL, data, DEALT, IMAGE, 0, workers=2, on_done=lambda client, _teacher: done.append(client))
    assert sorted(done) == [0, 1, 2]
    for client, (model, stats) in enumerate(results):
        here = initial_model(ALL.architecture(client), IMAGE, 0)
        expected = train_teacher(here, client_share(data, DEALT, 3, client, 0), image=IMAGE, config=ALL, seed=0, partition_id=client, round=1)
        assert state_hash(model.state_dict()) == state_hash(here.state_dict())
        assert stats == expected
        assert not model.training


def test_one_worker_trains_here_in_order() -> None:
    done: list[tuple[int, Trained]] = []
    results = train_all(ALL, tiny_data(), DEALT, IMAGE, 0, workers=1, on_done=lambda *one: done.append(one))
    assert done == list(enumerate(results))


@pytest.mark.parametrize("workers", [1, 2])
def test_teachers_of_an_earlier_start_are_not_trained_again(workers: int) -> None:
    whole = train_all(ALL, tiny_data(), DEALT, IMAGE, 0, workers=1)
    done: list[int] = []
    results = train_all(ALL, tiny_data(), DEALT, IMAGE, 0, workers=workers, finished={1: whole[1]}, on_done=lambda client, _teacher: done.append(client))
    assert sorted(done) == [0, 2]
    assert results[1] is whole[1]
    assert [state_hash(result.model.state_dict()) for result in results] == [state_hash(result.model.state_dict()) for result in whole]
    assert train_all(ALL, tiny_data(), DEALT, IMAGE, 0, workers=workers, finished=dict(enumerate(whole))) == whole


def test_an_error_of_a_client_is_one_of_this_library() -> None:
    diverging = ClientsConfig(count=2, architectures=("lenet",), epochs=2, lr=1e20, batch_size=16)
    with pytest.raises(CDFKDError, match="client 0, round 1"):
        train_all(diverging, tiny_data(), DEALT, IMAGE, 0, workers=1)


@pytest.mark.parametrize("dies", ["submit", "result"])
def test_a_process_that_dies_says_both_what_may_have_killed_it_and_what_to_do(dies: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ProcessPoolExecutor):
        def submit(self, *_: object, **__: object) -> Future[object]:  # type: ignore[override]
            if dies == "submit":  # while the shares of later clients are cut, the first process may be dead already
                raise BrokenProcessPool("died")
            future: Future[object] = Future()
            future.set_exception(BrokenProcessPool("died"))
            return future

    began: list[object] = []

    def pool(*args: object, **more: object) -> Pool:
        began.append(more["initializer"])
        return Pool(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("cdfkd_strategy.local_training.all_clients.ProcessPoolExecutor", pool)
    with pytest.raises(CDFKDError, match=r'a training process died.*if __name__ == "__main__":.*memory.*fewer workers'):
        train_all(ALL, tiny_data(), DEALT, IMAGE, 0, workers=2)
    assert began == [end_with_parent], "a worker ends with the one that started it, see test_child_process"


def fingerprint() -> str:
    """A hash of a digits subset, its partition, and a teacher."""
    config = DataConfig(train_size=200, partition=PartitionConfig(alpha=0.3))
    data = load_data(config, seed=5)
    mine = client_share(data, config, 3, 1, seed=5)
    model = initial_model("small_cnn", data.image, 5)
    train_teacher(model, mine, image=data.image, config=ClientsConfig(epochs=1, augment="shift"), seed=5, partition_id=1, round=1)
    digest = hashlib.sha256(state_hash(model.state_dict()).encode())
    for part in (data.x_train, data.x_test, *mine):
        digest.update(np.ascontiguousarray(part.numpy()).tobytes())
    return digest.hexdigest()


def test_another_process_with_other_threads_gives_the_same_bits() -> None:
    here = Path(__file__)
    script = f"import torch; torch.set_num_threads(2); torch.manual_seed(77)\nfrom {here.stem} import fingerprint\nprint(fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here.parent)])}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == fingerprint()


def test_cross_entropy_alone_is_reported_as_the_loss() -> None:
    """One batch of everything and a rate so small that the model stays: the loss is that of the common initialisation."""
    images = share(20)
    _, stats = trained(ClientsConfig(epochs=1, batch_size=32, lr=1e-12), images=images, student=fused_student())
    with torch.no_grad():
        logits = initial_model("lenet", IMAGE, seed=0)(IMAGE.normalise(images.x_train.float() / 255))
    assert stats["loss"] == pytest.approx(float(F.cross_entropy(logits, images.y_train)), rel=1e-4)


# -- schedules and starts of papers without clients --------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "expected"), [((), [0.2, 0.2, 0.02, 0.002]), ((0.05, 0.01), [0.2, 0.2, 0.05, 0.01])])
def test_multistep_lowers_the_rate_at_its_milestones(rates: tuple[float, ...], expected: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *more: (seen.append(self.param_groups[0]["lr"]), step(self, *more))[1])
    trained(ClientsConfig(epochs=4, batch_size=20, lr=0.2, schedule="multistep", milestones=(2, 3), milestone_rates=rates))
    steps = 3  # of 20, 20 and 10 images
    assert seen == pytest.approx([rate for rate in expected for _ in range(steps)])


def test_adam_is_torchs() -> None:
    config = ClientsConfig(epochs=1, batch_size=50, lr=0.01, optimizer="adam", schedule="constant", weight_decay=0.0)
    model, _ = trained(config)
    before = initial_model("lenet", IMAGE, seed=0)
    moved = max(float((a - b).abs().max().detach()) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert moved == pytest.approx(0.01, rel=1e-3), "Adam's first step has the size of its rate"


def test_clients_with_an_initialisation_of_their_own_differ_on_the_same_images() -> None:
    images = DataConfig(partition=PartitionConfig(name="replicated"), local_test=0.0)
    states = {}
    for init in ("common", "own"):
        config = ClientsConfig(count=2, architectures=("lenet",), epochs=1, lr=1e-6, init=init)  # type: ignore[arg-type]
        states[init] = [teacher.model.state_dict()["classifier.weight"] for teacher in train_all(config, tiny_data(), images, IMAGE, 0, workers=1)]
    assert torch.allclose(*states["common"], atol=1e-4), "only the order of the images differs"
    assert not torch.allclose(*states["own"], atol=1e-2)
    assert not torch.allclose(states["own"][0], states["common"][0], atol=1e-2)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"milestone_rates are 1 for 2 milestones"):
        ClientsConfig(milestones=(1, 2), milestone_rates=(0.1,))
    with pytest.raises(ConfigError, match=r"clients\.device is 'gpu'; accepted: cpu"):
        ClientsConfig(device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(CDFKDError, match=r"clients\.device is 'cuda', which torch does not see here"):
            train_all(ClientsConfig(device="cuda"), tiny_data(), DataConfig(), IMAGE, 0)
