"""Transfer sets and real images on their way through the engine, the offline job and the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cdfkd_strategy import cli, offline
from cdfkd_strategy.data.client_share import client_share
from cdfkd_strategy.data.datasets import load_data
from cdfkd_strategy.data.transfer_set import FILE_NAME, load_transfer_set
from cdfkd_strategy.distiller import METHODS
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError, DataError, NeedsError
from cdfkd_strategy.run_config import from_values
from cdfkd_strategy.summary import read_summary
from cdfkd_strategy.teachers import state_hash
from cdfkd_strategy.types import Needs
from tests.flower.memory_grid import tiny_strategy
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble
from tests.test_offline import VALUES, train

KD = ["method.name=kd", "method.epochs=1", "method.iterations=2", "method.batch_size=8"]
ZSKD = ["method.name=zskd", "method.rounds=2", "method.image_steps=2", "method.image_batch=10", "method.epochs=1", "method.iterations=2", "method.batch_size=8"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("transfer") / "teachers", "auto")


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdfkd_strategy.pictures.draw_pictures", lambda *_: [])


def cdfkd(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


# -- writing -------------------------------------------------------------------------------------------------------


def kept(method: str, count: int, out: Path, **changes: Any) -> Tensor:
    config = METHODS[method].Config.toy()
    distill(trained_ensemble(2), tiny_student(2), method, config=config, seed=3, out=out, engine=EngineConfig(device="cpu", transfer_images=count, **changes))
    found = load_transfer_set(out / FILE_NAME, DIGITS)
    assert (found.origin.method, found.origin.seed, found.origin.image) == (method, 3, DIGITS)
    assert found.origin.teachers == tuple(state_hash(net.state_dict()) for net in trained_ensemble(2).nets)
    return found.pixels


def test_a_pool_gives_different_images_and_no_more_than_it_has(tmp_path: Path) -> None:
    some, everything = kept("deep_inversion", 40, tmp_path / "some"), kept("deep_inversion", 1000, tmp_path / "all")
    assert len(some) == len(torch.unique(some, dim=0)) == 40
    assert len(everything) == METHODS["deep_inversion"].Config.toy().pool_size == 48
    assert {image.numpy().tobytes() for image in some} < {image.numpy().tobytes() for image in everything}


def test_a_generator_gives_as_many_as_asked_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    sample = METHODS["rdskd"].sample
    monkeypatch.setattr(METHODS["rdskd"], "sample", lambda self, count, rng: (asked.append(count), sample(self, count, rng))[1])
    pixels = kept("rdskd", 600, tmp_path / "run", watch_images=0)
    assert asked == [64, 256, 256, 256]  # 64 to look at; a last batch of 88 would be normalised with other statistics
    assert len(pixels) == 600
    assert len(torch.unique(pixels, dim=0)) > 590
    assert torch.equal(pixels, kept("rdskd", 600, tmp_path / "again", watch_images=0))


@pytest.mark.parametrize(("output", "clipped"), [("tanh", True), ("sigmoid", False)])
def test_what_is_clipped_is_said(output: Any, clipped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy = METHODS["dfad"].Config.toy()
    config = dataclasses.replace(toy, generator=dataclasses.replace(toy.generator, output=output))
    engine = EngineConfig(device="cpu", transfer_images=20, watch_images=0)
    distill(trained_ensemble(1), tiny_student(1), "dfad", config=config, out=tmp_path, engine=engine)
    assert ("were no pixels and were clipped" in caplog.text) is clipped


def test_a_method_without_images_keeps_none_and_says_so(teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cdfkd("distill", "--teachers", teachers, "--save-transfer-set", 5, "--out", tmp_path / "run", *KD) == 0
    assert "method 'kd' has made no images" in capsys.readouterr().err
    assert not (tmp_path / "run" / FILE_NAME).exists()


# -- the command ---------------------------------------------------------------------------------------------------


def test_what_one_run_keeps_another_learns_from_and_nothing_else(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cdfkd("distill", "--teachers", teachers, "--save-transfer-set", 15, "--out", tmp_path / "made", *ZSKD) == 0
    file = tmp_path / "made" / FILE_NAME
    seen: list[Tensor] = []
    real = METHODS["kd"].__init__

    def watched(self: Any, *arguments: Any, extras: Any = None, **named: Any) -> None:
        seen.append(extras.proxy_data)
        real(self, *arguments, extras=extras, **named)

    monkeypatch.setattr(METHODS["kd"], "__init__", watched)
    assert cdfkd("distill", "--teachers", teachers, "--transfer-set", file, "--out", tmp_path / "used", *KD[1:]) == 0
    image = offline.plan(teachers, []).teachers.image
    pixels = load_transfer_set(file, image).pixels
    assert len(pixels) == 15
    assert torch.equal(seen[0], image.normalise(pixels.float() / 255))
    config = read_summary(tmp_path / "used")["config"]
    assert (config["method"]["name"], config["server"]["transfer_set"]) == ("kd", str(file.resolve()))
    assert read_summary(tmp_path / "made")["config"]["server"]["transfer_set"] is None


def test_a_transfer_set_that_cannot_be_used_is_one_line_and_leaves_nothing(teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("not\nsafetensors", encoding="utf-8")
    cases = [
        (["--transfer-set", tmp_path / "text"], "cannot read the transfer set"),
        (["--transfer-set", tmp_path / "missing"], "cannot read the transfer set"),
        (["--transfer-set", tmp_path / "text", "--method", "rdskd"], "method 'rdskd' takes no images; accepted with it: kd"),
        (["--save-transfer-set", -1], "engine.transfer_images is -1; accepted: at least 0 (0 saves none)"),
    ]
    for arguments, words in cases:
        assert cdfkd("distill", "--teachers", teachers, "--out", tmp_path / "run", *arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()


# -- real images ---------------------------------------------------------------------------------------------------


def test_kd_gets_the_training_images_of_all_clients_and_no_others(teachers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = offline.plan(teachers, KD)
    images = offline.extras_of(plan.teachers, plan.config, plan.data).proxy_data
    assert images is not None
    data = load_data(plan.config.data, 5)
    shares = [client_share(data, plan.config.data, 2, k, 5) for k in range(2)]
    expected = torch.cat([share.x_train for share in shares])
    assert len(images) == len(expected) < len(data.x_train), "local test parts stay with their clients"

    def bag(pixels: Tensor) -> list[bytes]:
        return sorted(image.numpy().tobytes() for image in pixels)

    assert bag(data.image.to_pixels(images).mul(255).round().to(torch.uint8)) == bag(expected)
    monkeypatch.setattr(offline, "PROXY_IMAGES", 50)
    some = offline.extras_of(plan.teachers, plan.config, plan.data).proxy_data
    assert some is not None
    assert len(torch.unique(some, dim=0)) == 50
    other = offline.extras_of(plan.teachers, from_values(plan.teachers.config, [*KD, "seed=9", "data.seed=5"]), plan.data).proxy_data
    assert other is not None
    assert not torch.equal(other, some)


def test_no_other_method_gets_an_image(teachers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("images were looked up")

    monkeypatch.setattr(offline, "all_training_rows", forbidden)
    others = [name for name in METHODS if not METHODS[name].needs.proxy_data]
    assert len(others) >= 5
    for name in others:
        plan = offline.plan(teachers, [f"method.name={name}"])
        assert offline.extras_of(plan.teachers, plan.config, plan.data).proxy_data is None
    monkeypatch.setattr(METHODS["zskd"], "needs", Needs(proxy_data=True))
    with pytest.raises(AssertionError, match="looked up"):
        offline.plan(teachers, ZSKD)


def test_without_the_data_set_kd_is_refused(teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise DataError("the images are elsewhere")

    monkeypatch.setattr(offline, "load_data", gone)
    with pytest.raises(NeedsError, match="'kd' needs real images at the server, which this run does not have"):
        offline.plan(teachers, KD)
    assert cdfkd("distill", "--teachers", teachers, "--out", tmp_path / "run", *KD) == 2
    assert not (tmp_path / "run").exists()


def test_clients_with_sets_of_their_own_give_none() -> None:
    config = from_values(VALUES, [*KD, "data.partition.name=own"])
    data = load_data(from_values(VALUES).data, 5)
    assert offline.proxy_images(config, data.image, data) is None


def test_a_flower_server_refuses_a_method_that_takes_images() -> None:
    with pytest.raises(NeedsError, match="'kd' needs proxy_data; this strategy has client weights only"):
        tiny_strategy(method="kd", method_config=None)


def test_an_unused_setting_is_refused() -> None:
    config = from_values(VALUES, ["server.transfer_set=/somewhere"])
    with pytest.raises(ConfigError, match="'cdfkd_mfs' takes no images; accepted with it: kd"):
        offline.proxy_images(config, load_data(config.data, 5).image, None)
