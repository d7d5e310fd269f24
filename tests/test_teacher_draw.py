"""Some teachers per step: who comes when, how often, and what it does to a distillation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cdfkd_strategy import seeding
from cdfkd_strategy.engine import distill
from cdfkd_strategy.engine_config import RECOMPUTE_FROM, EngineConfig
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.methods.cdfkd_mfs import CDFKDMFS, CDFKDMFSConfig
from cdfkd_strategy.models.head_fusion import class_weights
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.teacher_draw import TeacherDraw
from tests.methods.trained_teachers import DIGITS, tiny_student, trained_ensemble


def skewed(teachers: int, classes: int = 10) -> Tensor:
    return class_weights(torch.rand(teachers, classes, generator=torch.Generator().manual_seed(teachers)) ** 4, teachers, classes)


@pytest.mark.parametrize(("teachers", "count"), [(5, 2), (7, 3), (20, 5), (100, 5), (3, 1), (9, 8)])
def test_every_teacher_takes_part_within_the_stated_steps(teachers: int, count: int) -> None:
    weights = skewed(teachers)
    weights[0] = 0.0  # one that knows nothing is not forgotten
    draw, rng = TeacherDraw(weights, count), torch.Generator().manual_seed(0)
    last = dict.fromkeys(range(teachers), -1)
    waited = 0
    for step in range(20 * draw.at_latest):
        chosen = draw.next(rng)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == count
        for teacher in chosen:
            last[teacher] = step
        waited = max(waited, *(step - seen for seen in last.values()))
    assert waited <= draw.at_latest
    assert draw.at_latest == 2 * math.ceil(teachers / math.ceil(count / 2)) - 1


def test_those_who_know_more_come_more_often() -> None:
    weights = class_weights(torch.tensor([[9.0, 9.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), 6, 2)
    draw, rng = TeacherDraw(weights, 2), torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(3000):
        counts[draw.next(rng)] += 1
    in_turn = 500.0
    # the second place, when the first is not theirs already: P(k) = w_k / (1 - w_first), over the six firsts
    mean = weights.mean(1)
    second = torch.stack([sum(mean[k] / (1 - mean[first]) for first in range(6) if first != k) / 6 for k in range(6)])  # type: ignore[arg-type]
    assert torch.allclose(counts, in_turn + 3000 * second, atol=100)


def test_all_of_them_use_no_randomness() -> None:
    draw, rng = TeacherDraw(skewed(3), 7), torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert draw.next(rng) == [0, 1, 2]
    assert torch.equal(rng.get_state(), before)
    assert draw.at_latest == 1


def test_a_draw_goes_on_where_it_was_saved() -> None:
    draw, rng = TeacherDraw(skewed(11), 3), torch.Generator().manual_seed(0)
    for _ in range(3):
        draw.next(rng)
    again, other = TeacherDraw(skewed(11), 3), torch.Generator()
    again.load_state_dict(draw.state_dict())
    other.set_state(rng.get_state())
    assert [again.next(other) for _ in range(20)] == [draw.next(rng) for _ in range(20)]


def test_nobody_is_an_error() -> None:
    with pytest.raises(ConfigError, match="0 teachers per step; accepted: at least 1"):
        TeacherDraw(skewed(3), 0)
    with pytest.raises(ConfigError, match="teachers_per_step is -1; accepted"):
        CDFKDMFSConfig(teachers_per_step=-1)


def distiller(count: int, per_step: int, *, fused: bool = True) -> CDFKDMFS:
    config = dataclasses.replace(CDFKDMFSConfig.toy(), teachers_per_step=per_step, mode="fused" if fused else "paper")
    with seeding.seeded_scope("draw"):
        return CDFKDMFS(
            trained_ensemble(count, skewed(count)), tiny_student(count), config, image=DIGITS, rng=seeding.generator("draw"), runtime=Runtime(threads=1)
        )


def test_a_step_trains_the_headers_of_those_drawn_and_the_trunk() -> None:
    method = distiller(4, 2)
    method.student.train()
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    rng = torch.Generator()
    rng.set_state(method.rng.get_state())
    chosen = TeacherDraw(method.teachers.weights, 2).next(rng)
    assert len(chosen) == 2
    method.student_step()
    changed = {name for name, value in method.student.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("headers.")} == {str(k) for k in chosen}
    assert any(name.startswith("trunk.") for name in changed)


def test_student_and_generator_have_turns_of_their_own() -> None:
    """Else a teacher's turn could come in steps of the generator alone, and its header would not be trained."""
    method = distiller(4, 2)
    method.student.train()
    seen: dict[str, list[tuple[int, ...]]] = {"student": [], "generator": []}
    for kind, chosen in seen.items():
        draw: TeacherDraw = getattr(method, f"{kind}_draw")
        draw.next = lambda rng, chosen=chosen, ask=draw.next: chosen.append(tuple(ask(rng))) or list(chosen[-1])  # type: ignore[method-assign,misc,func-returns-value]
    for _ in range(8):
        method.student_step()
        method.generator_step()
    for kind, chosen in seen.items():
        at_latest = getattr(method, f"{kind}_draw").at_latest
        assert len(chosen) == 8
        for start in range(8 - at_latest + 1):
            assert {k for some in chosen[start : start + at_latest] for k in some} == {0, 1, 2, 3}


@pytest.mark.parametrize(("per_step", "expected"), [(0, 9), (2, 2), (30, 9)])
def test_only_those_of_a_step_count_for_recomputing(per_step: int, expected: int) -> None:
    assert CDFKDMFS.teachers_at_once(CDFKDMFSConfig(teachers_per_step=per_step), 9) == expected
    config = dataclasses.replace(CDFKDMFSConfig.toy(), epochs=1, iterations=1, student_steps=1, teachers_per_step=per_step)
    engine = EngineConfig(device="cpu", threads=1, precision="float32", watch_images=0, progress=False)
    result = distill(trained_ensemble(9, skewed(9)), tiny_student(9), "cdfkd_mfs", config=config, image=DIGITS, engine=engine)
    assert result.runtime.recompute is (expected >= RECOMPUTE_FROM)


def test_the_weights_of_those_drawn_sum_to_one_again() -> None:
    teachers = trained_ensemble(4, skewed(4))
    teachers.weights[1:3, 5] = 0.0
    some = teachers.drawn([1, 2])
    table = teachers.weights[[1, 2]]
    expected = table / table.sum(0)
    expected[:, 5] = 0.5  # neither knows the class
    assert torch.allclose(some.weights, expected)
    assert teachers.drawn([0, 1, 2, 3]) is teachers


@pytest.mark.parametrize("fused", [True, False])
def test_drawing_all_is_not_drawing(fused: bool) -> None:
    one, other = distiller(3, 0, fused=fused), distiller(3, 3, fused=fused)
    assert one.run_epoch(0) == other.run_epoch(0)


def test_an_epoch_with_draws_is_restored_exactly() -> None:
    whole, first, second = distiller(4, 2), distiller(4, 2), distiller(4, 2)
    whole.run_epoch(0)
    first.run_epoch(0)
    second.load_state_dict(first.state_dict())
    assert second.run_epoch(1) == whole.run_epoch(1)
