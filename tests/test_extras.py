"""What a method declares besides teachers is checked before training, and is all that it gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cdfkd_strategy.distiller import Distiller
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import CheckpointError, NeedsError
from cdfkd_strategy.teachers import state_hash
from cdfkd_strategy.types import Extras, Needs
from tests.methods.remembering import Nothing, Remembering
from tests.methods.trained_teachers import tiny_student, trained_ensemble

COUNTS = torch.tensor([[3, 0, 1, 2, 0, 0, 9, 0, 0, 3], [0, 5, 1, 2, 0, 4, 0, 0, 7, 3]])
ALL = Extras(label_counts=COUNTS, proxy_data=torch.zeros(4, 1, 8, 8), aggregated_weights={"bias": torch.ones(2)})
NAMES = ("label_counts", "proxy_data", "aggregated_weights")


def declaring(*names: str) -> type[Distiller]:
    Remembering.seen.clear()
    return type("Declaring", (Remembering,), {"needs": Needs(**dict.fromkeys(names, True))})


def run(method: type[Distiller], extras: Extras | None, **options: Any) -> None:
    distill(trained_ensemble(2), options.pop("student", tiny_student(2)), method, extras=extras, engine=EngineConfig(device="cpu", watch_images=0), **options)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_declared_and_not_there_is_refused_before_anything_happens(name: str, tmp_path: Path) -> None:
    student = tiny_student(2)
    before = state_hash(student.state_dict())
    for extras in (None, replace(ALL, **{name: None})):
        with pytest.raises(NeedsError, match=rf"'remembering' needs {Needs.words(name)}, which this run does not have; .*Extras\({name}=\.\.\.\)"):
            run(declaring(name), extras, student=student, out=tmp_path / "run")
    assert not Remembering.seen
    assert state_hash(student.state_dict()) == before
    assert not (tmp_path / "run").exists()


def test_a_method_gets_what_it_declared_and_nothing_else() -> None:
    for names in ((), *((name,) for name in NAMES), NAMES):
        run(declaring(*names), ALL)
        (given,) = Remembering.seen
        assert {name: getattr(given, name) for name in NAMES} == {name: getattr(ALL, name) if name in names else None for name in NAMES}


def test_a_method_that_is_built_by_hand_is_checked_too() -> None:
    teachers, student = trained_ensemble(1), tiny_student(1)
    others: dict[str, Any] = {"image": teachers.image, "rng": torch.Generator(), "runtime": EngineConfig(device="cpu").runtime()}
    with pytest.raises(NeedsError, match="label counts per class and real images at the server"):
        declaring("label_counts", "proxy_data")(teachers, student, Nothing(), **others)
    assert declaring()(teachers, student, Nothing(), **others, extras=ALL).extras.tensors() == {}


def test_extras_are_part_of_a_runs_identity_and_are_not_in_its_checkpoint(tmp_path: Path) -> None:
    method = declaring("label_counts", "proxy_data")
    run(method, ALL, out=tmp_path)
    assert b"label_counts" not in (tmp_path / "checkpoint" / "state.safetensors").read_bytes()
    run(method, ALL, out=tmp_path, resume=True)
    assert len(Remembering.seen) == 1, "the finished run is read back"
    with pytest.raises(CheckpointError, match="another extras"):
        run(method, replace(ALL, label_counts=COUNTS + 1), out=tmp_path, resume=True)
