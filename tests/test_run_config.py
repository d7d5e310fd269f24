"""Configurations: names, inheritance, overrides, and errors that say what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cdfkd_strategy import run_config
from cdfkd_strategy.competence import COMPETENCE
from cdfkd_strategy.config import to_dict
from cdfkd_strategy.errors import ConfigError, UnknownNameError
from cdfkd_strategy.methods import METHODS
from cdfkd_strategy.run_config import RunConfig, ServerConfig, config_names, find_config, from_values, read_config, resolve


def write(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run_config, "config_roots", lambda: [tmp_path])
    return tmp_path


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_configuration_resolves(name: str) -> None:
    config = resolve(name)
    assert to_dict(from_values(to_dict(config))) == to_dict(config), "the resolved form does not resolve to itself"


@pytest.mark.parametrize("name", [name for name in config_names() if "/" in name])
def test_a_cell_is_named_after_its_file(name: str) -> None:
    config = resolve(name)
    assert f"{config.study}/{config.cell}" == name


def test_rounds_and_one_shot_have_the_same_budget() -> None:
    for alpha in ("dir0.5", "dir0.1"):
        rounds, oneshot = resolve(f"fashion_mnist/{alpha}-rounds3"), resolve(f"fashion_mnist/{alpha}-oneshot3")
        assert rounds.server.rounds == 3
        assert oneshot.server.rounds == 1
        assert oneshot.clients.epochs == 3 * rounds.clients.epochs
        assert oneshot.method["epochs"] == 3 * rounds.method["epochs"]
        same = ("iterations", "student_steps", "generator_steps", "batch_size")
        assert [oneshot.method[key] for key in same] == [rounds.method[key] for key in same]
        assert oneshot.data == rounds.data


def test_overrides_are_typed_and_deep() -> None:
    config = resolve("digits", ["method.epochs=6", "data.partition.alpha=1e-1", "clients.architectures=[lenet, resnet8]", "seed=7", "engine.max_seconds=null"])
    assert (config.method["epochs"], config.data.partition.alpha, config.seed, config.engine.max_seconds) == (6, 0.1, 7, None)
    assert config.clients.architectures == ("lenet", "resnet8")


def test_the_method_is_complete_and_bound() -> None:
    config = from_values({"method": {"name": "cdfkd_mfs", "epochs": 3}})
    name, method_config = config.method_config()
    assert name == "cdfkd_mfs"
    assert isinstance(method_config, METHODS[name].Config)
    assert method_config.epochs == 3
    assert set(config.method) == {"name", *to_dict(METHODS[name].Config())}
    assert to_dict(config) != to_dict(RunConfig())
    assert to_dict(from_values({"method": {"name": "cdfkd_mfs"}})) == to_dict(RunConfig()), "defaults written out or not: one experiment"


def test_another_method_does_not_inherit_the_keys_of_the_first() -> None:
    other = next(name for name in METHODS if name != "cdfkd_mfs")
    config = resolve("digits", [f"method.name={other}"])
    assert config.method == {"name": other, **to_dict(METHODS[other].Config())}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["nonsense=1"], ["nonsense", "clients", "engine", "student"]),
        (["method.epoch=6"], ["method.epoch", "epochs", "student_lr"]),
        (["method.name=mfs"], ["mfs", *METHODS]),
        (["server.weights=best"], ["best", *COMPETENCE, "label_counts"]),
        (["server.round=2"], ["server.round", "rounds", "min_teachers"]),
        (["server.broadcast=all"], ["all", "heads", "single"]),
        (["seed=one"], ["seed", "one", "int"]),
        (["method.epochs"], ["method.epochs", "key=value"]),
        (["server.rounds=0"], ["server.rounds", "at least 1"]),
        (["server.fraction_train=0"], ["fraction_train", "above 0"]),
        (["server.fraction_evaluate=1.5"], ["fraction_evaluate", "at most 1"]),
        (["server.timeout=0"], ["server.timeout", "above 0 (seconds)"]),
        (["server.node_wait=.inf"], ["server.node_wait", "a finite number"]),
        (["cell=a/b"], ["cell", "a/b", "file name"]),
        (["method=cdfkd_mfs"], ["method", "cdfkd_mfs"]),
        (["student.stages=0"], ["student.stages", "at least 1"]),
        (["student.max_width=0"], ["student.max_width", "at least 1"]),
        (["student.heads=plain", "student.stages=1"], ["student.stages", "student.heads=plain has none"]),
        (["student.heads=plain", "student.max_width=64"], ["student.max_width", "student.heads=plain has none"]),
    ],
)
def test_an_unknown_key_or_value_says_what_is_accepted(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("digits", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_missing_method_name_lists_the_methods() -> None:
    with pytest.raises(UnknownNameError, match="cdfkd_mfs"):
        from_values({"method": {"epochs": 3}})


def test_server_weights_may_be_any_estimate_or_an_opt_in() -> None:
    for name in (*COMPETENCE, run_config.LABEL_COUNTS):
        assert ServerConfig(weights=name).weights == name


def test_base_is_merged_deeply_and_beside_first(roots: Path) -> None:
    write(
        roots / "a/base.yaml",
        {"study": "a", "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 0.5}}, "method": {"name": "cdfkd_mfs", "epochs": 9}},
    )
    write(roots / "base.yaml", {"study": "wrong"})
    write(roots / "a/one.yaml", {"base": "base", "cell": "one", "data": {"partition": {"alpha": 0.1}}})
    write(roots / "a/two.yaml", {"base": "one", "cell": "two", "seed": 5})
    values = read_config(find_config("two"))
    assert values == {
        "study": "a",
        "cell": "two",
        "seed": 5,
        "data": {"name": "digits", "partition": {"name": "dirichlet", "alpha": 0.1}},
        "method": {"name": "cdfkd_mfs", "epochs": 9},
    }


def test_names_paths_and_their_errors(roots: Path) -> None:
    one, two = write(roots / "x/same.yaml", {"cell": "x"}), write(roots / "y/same.yaml", {"cell": "y"})
    write(roots / "y/dir0.5.yaml", {"cell": "y"})
    assert find_config("x/same") == one
    assert find_config(str(two)) == two
    assert find_config("dir0.5") == roots / "y/dir0.5.yaml"
    with pytest.raises(ConfigError, match=r"not unique; accepted: x/same, y/same"):
        find_config("same")
    with pytest.raises(UnknownNameError, match=r"'z'; accepted: x/same, y/dir0\.5, y/same"):
        find_config("z")
    with pytest.raises(ConfigError, match=r"no configuration file z\.yaml"):
        find_config("z.yaml")


def test_a_base_in_a_circle_is_an_error(roots: Path) -> None:
    write(roots / "p.yaml", {"base": "q"})
    write(roots / "q.yaml", {"base": "p"})
    with pytest.raises(ConfigError, match=r"p\.yaml -> q\.yaml -> p\.yaml"):
        read_config(find_config("p"))


def test_the_installed_copy_is_used_without_a_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "cdfkd_strategy"
    write(package / "configs/digits.yaml", {"cell": "installed"})
    monkeypatch.setattr(run_config, "__file__", str(package / "run_config.py"))
    assert config_names() == ["digits"]
    assert read_config(find_config("digits")) == {"cell": "installed"}
