"""Clients with images of their own, and a server with none: whose images are read, when, and what does not fit is said."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from cdfkd_strategy.config import to_dict
from cdfkd_strategy.data.datasets import DataConfig, load_data
from cdfkd_strategy.errors import ConfigError, DataError, TooFewTeachersError
from cdfkd_strategy.flower import apps, place
from cdfkd_strategy.flower.apps import make_client_app, serve
from cdfkd_strategy.flower.arrays import to_record
from cdfkd_strategy.flower.simulation import simulate
from cdfkd_strategy.harness import Harness
from cdfkd_strategy.local_training import initial_model
from cdfkd_strategy.run_config import RunConfig, from_values
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import ACCURACY_KEYS, read_summary
from tests.flower.memory_grid import MemoryGrid, project_grid, tiny_config

SPEC = {"channels": 1, "height": 8, "width": 8, "num_classes": 10, "mean": [0.3], "std": [0.4]}
CLIENTS = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDFKD_CACHE", str(tmp_path / "cache"))
    place._load.cache_clear()


def deployment(**data: Any) -> RunConfig:
    """A run whose server has no images."""
    values = to_dict(tiny_config(server={"node_wait": 0.2, "min_teachers": CLIENTS}))
    return from_values({**values, "data": {"name": None, "image": SPEC, **data}})


def write_sites(folder: Path, tests: int = 10) -> list[Path]:
    """One ``.npz`` per client, of different sizes, none with all classes."""
    digits = load_data(DataConfig(), seed=0)
    paths = []
    for site in range(CLIENTS):
        rows = torch.nonzero(digits.y_train % CLIENTS == site).flatten()[: 60 + 10 * site]
        images, labels = digits.x_train[rows, 0].numpy(), digits.y_train[rows].numpy()
        path = folder / f"site{site}.npz"
        np.savez(path, x_train=images[tests:], y_train=labels[tests:], x_test=images[:tests], y_test=labels[:tests])
        paths.append(path)
    return paths


def sites_grid(paths: list[Path]) -> MemoryGrid:
    grid = MemoryGrid([make_client_app()] * CLIENTS)
    for (_, context), path in zip(grid.nodes.values(), paths, strict=True):
        context.node_config["data-path"] = str(path)
    return grid


def test_a_server_without_images_distils_clients_with_their_own(tmp_path: Path) -> None:
    config, paths = deployment(), write_sites(tmp_path)
    strategy = serve(sites_grid(paths), config, tmp_path / "run", resume=False)
    assert [spec.num_samples for spec in strategy.teachers.specs] == [50, 60, 70]  # type: ignore[union-attr]
    (record,) = read_summary(tmp_path / "run")["rounds"]
    assert record["accuracy"] == dict.fromkeys(ACCURACY_KEYS)
    student = load_student(tmp_path / "run")
    assert (student.image.num_classes, student.image.mean, student.image.std) == (10, (0.3,), (0.4,))
    assert set(strategy.rounds[0].evaluate_clients) == {"student-accuracy", "teacher-accuracy"}  # type: ignore[arg-type]


def test_own_images_may_be_given_in_the_client_app_too(tmp_path: Path) -> None:
    config, paths = deployment(), write_sites(tmp_path)
    named = serve(sites_grid(paths), config, None, resume=False)
    given = serve(MemoryGrid([make_client_app(data=DataConfig(name="npz", path=str(path))) for path in paths]), config, None, resume=False)
    assert [spec.sha256 for spec in named.teachers.specs] == [spec.sha256 for spec in given.teachers.specs]  # type: ignore[union-attr]


def test_without_test_images_a_part_of_the_own_ones_is_held_out(tmp_path: Path) -> None:
    config, paths = deployment(local_test=0.2), write_sites(tmp_path, tests=0)
    strategy = serve(sites_grid(paths), config, None, resume=False)
    assert [spec.num_samples for spec in strategy.teachers.specs] == [48, 56, 64]  # type: ignore[union-attr]
    assert strategy.rounds[0].evaluate_clients is not None


def test_hello_reads_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()

    def unreadable(config: DataConfig, seed: int) -> None:
        raise AssertionError("images were read")

    monkeypatch.setattr(place, "load_data", unreadable)
    sent = apps._for_clients(config, load_data(config.data, config.seed).image, None)
    for grid in (project_grid(config), MemoryGrid([make_client_app()] * CLIENTS)):
        for partition in range(CLIENTS):
            ids = grid.push_messages([Message(apps.payload.request(None, sent, 1, keys=apps.payload.Keys()), grid.node(partition), "query.hello")])
            (reply,) = grid.pull_messages(ids)
            assert not reply.has_error(), reply.error.reason
            assert reply.content["teacher"]["partition-id"] == partition
            assert reply.content["teacher"]["arch"] == "lenet_bn"


def test_a_server_with_a_test_set_deals_nothing_to_clients_with_their_own(tmp_path: Path) -> None:
    shared, paths = tiny_config(), write_sites(tmp_path)
    own = dataclasses.replace(shared, data=dataclasses.replace(shared.data, partition=dataclasses.replace(shared.data.partition, name="own")))
    strategy = serve(sites_grid(paths), own, tmp_path / "run", resume=False)
    assert [spec.num_samples for spec in strategy.teachers.specs] == [50, 60, 70]  # type: ignore[union-attr]
    (record,) = read_summary(tmp_path / "run")["rounds"]
    assert record["accuracy"]["student_merged"] is not None
    assert record["accuracy"]["ensemble_oracle"] is None  # the partition that it would come from was never dealt
    assert Harness(own, load_data(own.data, 0)).label_counts is None


def refusal(run: RunConfig, node_config: dict[str, Any], **choices: Any) -> str:
    """The error of a client that is asked who it is."""
    grid = MemoryGrid([make_client_app(**choices)])
    grid.nodes[grid.node(0)][1].node_config.update(node_config)
    image = run.data.image or load_data(run.data, run.seed).image
    settings = apps._for_clients(run, image, None) if "config" not in choices else ConfigRecord()
    ids = grid.push_messages([Message(apps.payload.request(None, settings, 1, keys=apps.payload.Keys()), grid.node(0), "query.hello")])
    (reply,) = grid.pull_messages(ids)
    return (reply.error.reason or "") if reply.has_error() else ""


def test_who_has_which_images_must_be_clear() -> None:
    assert "this node names none; start the SuperNode with --node-config 'partition-id=0 data-path=" in refusal(deployment(), {})
    assert "deals those of 'digits' to its clients; set data.partition.name=own" in refusal(tiny_config(), {"data-path": "/data/mine.npz"})
    assert "data-path=7 and data-name=None; accepted: texts" in refusal(deployment(), {"data-path": 7})
    assert "needs data.class_names at the server" in refusal(deployment(), {"data-path": "/data/mine"})
    own = tiny_config(data={"partition": {"name": "own"}})
    assert "give data.image in the configuration of make_client_app" in refusal(own, {"data-path": "/data/mine.npz"}, config=own)
    assert refusal(deployment(), {"data-path": "/data/mine.npz"}) == ""


def test_a_node_without_images_is_refused_with_its_reason_and_gets_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("flwr").propagate = True
    config, paths = deployment(), write_sites(tmp_path)
    grid = sites_grid(paths)
    del grid.nodes[grid.node(1)][1].node_config["data-path"]
    with pytest.raises(TooFewTeachersError, match=r"2 teachers at most \(clients 0, 2\), with 3 nodes connected.* this node names none; start the SuperNode"):
        serve(grid, config, None, resume=False)
    assert grid.asked("train") == []
    fewer = dataclasses.replace(config, server=dataclasses.replace(config.server, min_teachers=2))
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy = serve(grid, fewer, None, resume=False)
    assert (grid.asked("train"), grid.asked("evaluate")) == ([0, 2], [0, 2])
    reason = strategy.rounds[0].quarantined[str(grid.node(1))]
    assert "this node names none; start the SuperNode with --node-config 'partition-id=0 data-path=" in reason
    assert any(f"node {grid.node(1)} takes no part: {reason}" in record.message for record in caplog.records)


def trained(config: RunConfig, arch: str, node_config: dict[str, Any]) -> RecordDict:
    """What a client with this node configuration answers to the first train message."""
    image = config.data.image
    assert image is not None
    app, start = make_client_app(), initial_model(arch, image, config.seed)
    grid = MemoryGrid([app])
    grid.nodes[grid.node(0)][1].node_config.update(node_config)
    content = apps.payload.request(to_record(start.state_dict()), apps._for_clients(config, image, None), 1, keys=apps.payload.Keys())
    (reply,) = grid.pull_messages(grid.push_messages([Message(content, grid.node(0), "train")]))
    assert not reply.has_error(), reply.error.reason
    return reply.content


def test_a_node_may_name_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``data-name`` alone, of a built-in set or a file in ``CDFKD_DATA``; beside ``data-path`` it says what is there."""
    (_, site, _), config = write_sites(tmp_path), deployment()
    monkeypatch.setenv("CDFKD_DATA", str(tmp_path))
    alone = trained(config, "lenet_bn", {"data-name": "site1"})
    assert alone["metrics"]["num-examples"] == 60
    for same in ({"data-path": str(site)}, {"data-name": "npz", "data-path": str(site)}, {"data-name": "site1", "data-path": str(tmp_path)}):
        content = trained(config, "lenet_bn", same)
        assert {name: array.data for name, array in content["arrays"].items()} == {name: array.data for name, array in alone["arrays"].items()}
    digits = trained(config, "lenet_bn", {"data-name": "digits"})
    assert digits["metrics"]["num-examples"] == len(load_data(DataConfig(), 0).x_train)
    with pytest.raises(AssertionError, match=r"UnknownNameError: unknown data set 'sites'; accepted: .*site1"):
        trained(config, "lenet_bn", {"data-name": "sites"})


def test_a_client_trains_on_its_image_folder(tmp_path: Path) -> None:
    """Two classes of the run's three, at another size: numbered by the run's names, resized to its images."""
    names, rng = ("ant", "bee", "cat"), np.random.default_rng(0)
    for name in ("cat", "bee"):
        for index in range(10):
            (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(tmp_path / "mine" / name / f"{index}.png")
    config = deployment(image={"channels": 3, "height": 8, "width": 8, "num_classes": 3}, class_names=list(names), local_test=0.2)
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, weights="label_counts"))
    content = trained(config, "lenet_bn", {"data-path": str(tmp_path / "mine"), "label-counts": True})
    assert content["teacher"]["label-counts"] == [0, 8, 8]  # a folder without parts is split 80/20 per class
    assert content["metrics"]["num-examples"] == 16
    named = trained(config, "lenet_bn", {"data-name": "folder", "data-path": str(tmp_path / "mine"), "label-counts": True})
    assert {name: array.data for name, array in named["arrays"].items()} == {name: array.data for name, array in content["arrays"].items()}


def test_images_that_do_not_fit_are_quarantined_with_a_reason(tmp_path: Path) -> None:
    config, paths = deployment(), write_sites(tmp_path)
    colour = np.zeros((20, 8, 8, 3), np.uint8)
    np.savez(paths[0], x_train=colour, y_train=np.arange(20) % 10, x_test=colour[:2], y_test=np.arange(2))
    grey = colour[..., 0]
    np.savez(paths[1], x_train=grey, y_train=np.arange(20) % 11, x_test=grey[:2], y_test=np.arange(2))
    strategy = serve(sites_grid(paths), dataclasses.replace(config, server=dataclasses.replace(config.server, min_teachers=1)), None, resume=False)
    reasons = strategy.rounds[0].quarantined
    assert list(reasons) == ["0", "1"]
    assert "images of (3, 8, 8) and 10 classes; accepted in this run (data.image): (1, 8, 8)" in reasons["0"]
    assert "and 11 classes" in reasons["1"]


def test_an_image_folder_has_the_class_numbers_of_the_run(tmp_path: Path) -> None:
    names = ("ant", "bee", "cat")
    for name in ("bee", "cat"):  # this client has never seen an ant
        for index in range(10):
            (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (index, 0, 0)).save(tmp_path / "mine" / name / f"{index}.png")
    spec = {"channels": 3, "height": 8, "width": 8, "num_classes": 3}
    config = deployment(image=spec, class_names=list(names))
    mine = place._own(DataConfig(name="folder", path=str(tmp_path / "mine")), config.data)
    assert mine is not None
    data = load_data(mine, 0)
    assert sorted(set(data.y_train.tolist())) == [1, 2]
    assert (data.class_names, data.image.shape) == (names, (3, 8, 8))
    (tmp_path / "mine" / "bee").rename(tmp_path / "mine" / "wasp")
    with pytest.raises(DataError, match=r"folders named wasp; accepted \(data.class_names\): ant, bee, cat"):
        load_data(mine, 0)


def test_a_simulation_needs_images(tmp_path: Path) -> None:
    for config in (deployment(), tiny_config(data={"partition": {"name": "own"}})):
        with pytest.raises(ConfigError, match="the clients of a simulation have no images of their own"):
            simulate(config, tmp_path / "run")
