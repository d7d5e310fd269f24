"""What is asked for, and what becomes of it on this machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from cdfkd_strategy import runtime as runtime_module
from cdfkd_strategy.engine_config import RECOMPUTE_FROM, EngineConfig
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.runtime import Runtime


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that is faster in bfloat16, and which of them were measured."""
    asked: list[str] = []
    monkeypatch.setattr(runtime_module, "measured_precision", lambda device: asked.append(device) or "bfloat16")
    return asked


def test_what_is_left_open_is_resolved(measured: list[str]) -> None:
    runtime = EngineConfig(device="cpu").runtime()
    assert runtime == Runtime(device="cpu", channels_last=True, threads=torch.get_num_threads(), precision="bfloat16", fold=True, recompute=False)
    assert measured == ["cpu"]


def test_what_is_asked_for_is_done_and_nothing_is_measured(measured: list[str]) -> None:
    engine = EngineConfig(device="cpu", threads=3, channels_last=False, precision="float32", fold=False, recompute_teachers=True)
    assert engine.runtime() == Runtime(device="cpu", channels_last=False, threads=3, precision="float32", fold=False, recompute=True)
    assert measured == []


@pytest.mark.parametrize(
    ("asked", "teachers", "recompute"),
    [("auto", RECOMPUTE_FROM - 1, False), ("auto", RECOMPUTE_FROM, True), (False, RECOMPUTE_FROM, False), (True, 1, True)],
)
def test_many_teachers_are_computed_twice(asked: bool, teachers: int, recompute: bool) -> None:
    engine = EngineConfig(device="cpu", recompute_teachers=asked)
    assert engine.recomputing(engine.runtime(), teachers).recompute is recompute


def test_the_runtime_of_another_run_is_taken_whole(tmp_path: Path, measured: list[str]) -> None:
    theirs = Runtime(device="cpu", channels_last=False, threads=5, precision="float32", fold=True)
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 1, "runtime": theirs.to_dict()}))
    assert EngineConfig(runtime_from=str(tmp_path / "summary.json"), precision="bfloat16").runtime() == theirs
    assert measured == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be used .*No such file.*accepted: the summary.json of a run"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ('{"seed": 1}', "cannot be used .*runtime"),
        ('{"runtime": null}', "accepted"),
        ('{"runtime": {"device": "cuda:99"}}', "torch does not see"),
        ('{"runtime": {"speed": 9}}', "runtime.speed"),
    ],
)
def test_a_file_that_has_no_runtime_for_this_machine_is_an_error(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "summary.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        EngineConfig(runtime_from=str(path)).runtime()


def test_a_run_that_goes_on_keeps_its_precision(caplog: pytest.LogCaptureFixture) -> None:
    began = Runtime(threads=1, precision="float32")
    with caplog.at_level(logging.INFO):
        assert EngineConfig(precision="bfloat16").continued(began) is began
    assert "engine.precision=bfloat16: not used" in caplog.text


def test_fewer_than_no_teachers_cannot_be_resident() -> None:
    with pytest.raises(ConfigError, match="resident_teachers is -1; accepted"):
        EngineConfig(resident_teachers=-1)
