"""Nested state survives a round trip, a crash between two writes leaves a whole checkpoint, and nothing is unpickled."""

from __future__ import annotations

import errno
import math
import os
import stat
from pathlib import Path

import pytest
import torch

from cdfkd_strategy import checkpoint
from cdfkd_strategy.errors import CheckpointError


def test_nested_state_round_trips(tmp_path: Path) -> None:
    state = {
        "tensor": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(1.5, dtype=torch.double),
        "optimiser": {
            "state": {0: {"step": torch.tensor(3.0)}, 7: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 7], "foreach": None}],
        },
        "infinite": math.inf,
        "text": "x",
        "flag": True,
    }
    checkpoint.save_state(tmp_path / "state", state)
    back = checkpoint.load_state(tmp_path / "state")
    assert torch.equal(back["tensor"], state["tensor"])  # type: ignore[arg-type]
    assert back["tensor"].dtype == torch.int64
    assert back["scalar"].dtype == torch.double
    assert back["optimiser"]["param_groups"] == state["optimiser"]["param_groups"]  # type: ignore[index]
    assert list(back["optimiser"]["state"]) == [0, 7]
    assert back["infinite"] == math.inf
    assert (back["text"], back["flag"]) == ("x", True)


def test_an_optimiser_continues_bit_identically(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1)

    def step(layer: torch.nn.Linear, optimiser: torch.optim.Adam) -> None:
        optimiser.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()

    layer, optimiser = make()
    step(layer, optimiser)
    checkpoint.save_state(tmp_path / "c", {"layer": layer.state_dict(), "optimiser": optimiser.state_dict()})
    step(layer, optimiser)
    other, again = make()
    saved = checkpoint.load_state(tmp_path / "c")
    other.load_state_dict(saved["layer"])
    again.load_state_dict(saved["optimiser"])
    step(other, again)
    assert torch.equal(layer.weight, other.weight)


def test_two_checkpoints_are_kept_and_the_older_one_serves_when_the_newer_is_missing(tmp_path: Path) -> None:
    for value in (1, 2, 3):
        checkpoint.save_state(tmp_path / "c", {"value": value})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.previous"]
    assert checkpoint.load_state(tmp_path / "c")["value"] == 3
    (tmp_path / "c" / "state.json").unlink()  # as if the process died between the two renames
    (tmp_path / "c" / "state.safetensors").unlink()
    assert checkpoint.has_state(tmp_path / "c")
    assert checkpoint.load_state(tmp_path / "c")["value"] == 2


def test_missing_and_broken_checkpoints_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load_state(tmp_path / "nothing")
    checkpoint.save_state(tmp_path / "c", {"value": torch.ones(2)})
    (tmp_path / "c" / "state.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load_state(tmp_path / "c")


def test_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot store a object"):
        checkpoint.save_state(tmp_path / "c", {"value": object()})


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    checkpoint.save_tensors(tmp_path / "one", tensors)
    checkpoint.save_tensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the names of open files are found in /proc")
def test_a_renaming_is_on_the_disk_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is renamed is in a directory: without a sync of that one, too, a machine that loses its power may keep the old name."""
    events: list[tuple[str, Path]] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def sync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append(("rename", target)), replace(self, target))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append(("rename", target)), rename(self, target))[1])
    checkpoint.write_json(tmp_path / "state.json", {})
    checkpoint.save_tensors(tmp_path / "teacher.safetensors", {"weight": torch.ones(2)})
    assert [event for event in events if event[0] == "rename" or event[1] == tmp_path] == [
        *(("rename", tmp_path / "state.json"), ("sync", tmp_path)),
        *(("rename", tmp_path / "teacher.safetensors"), ("sync", tmp_path)),
    ]
    for _ in range(2):
        events.clear()
        checkpoint.save_state(tmp_path / "c", {"value": torch.ones(2)})
        assert events[-2:] == [("rename", tmp_path / "c"), ("sync", tmp_path)]
        assert ("sync", tmp_path / "c.new") in events


def test_where_a_directory_cannot_be_synced_files_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    checkpoint.save_state(tmp_path / "c", {"value": torch.ones(2)})
    assert torch.equal(checkpoint.load_state(tmp_path / "c")["value"], torch.ones(2))


def test_the_only_whole_checkpoint_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead between two renames, and dead again while the next one is written: the older one is all there is."""
    for value in (1, 2):
        checkpoint.save_state(tmp_path / "c", {"value": value})
    rename = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if self.name == "c.new":
            raise KeyboardInterrupt
        return rename(self, target)

    def dead(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, name, how, value in ((Path, "rename", dying, 3), (checkpoint, "save_tensors", dead, 4)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, how)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save_state(tmp_path / "c", {"value": value})
    assert checkpoint.load_state(tmp_path / "c")["value"] == 2
