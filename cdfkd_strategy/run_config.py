"""One run's configuration: YAML files and ``key=value`` overrides, bound to frozen dataclasses, method included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cdfkd_strategy.competence import COMPETENCE, LABEL_COUNTS
from cdfkd_strategy.config import bind, load_yaml, override, require, to_dict
from cdfkd_strategy.data.datasets import DataConfig
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError, UnknownNameError
from cdfkd_strategy.local_training import ClientsConfig
from cdfkd_strategy.methods import METHODS, get_method
from cdfkd_strategy.models.stages import MAX_STAGES
from cdfkd_strategy.warm_start import Heads, Init

PATIENCE = ("node_wait", "timeout", "min_teachers", "min_available_nodes")
"""Keys of ``server`` that may differ when a run is continued: what an interrupted run is told to change."""

WHERE = ("data.path", "clients.device", "clients.num_cpus")
"""Settings that say where, and not what: teachers and runs do not become others by them."""


@dataclass(frozen=True)
class ServerConfig:
    """What the server does around the distillation.

    Args:
        rounds: federated rounds.
        weights: how the class weights [K, C] of the teachers are had: a competence estimate, or "label_counts",
            to which every client must consent: by a configuration of its own (`make_client_app(config)`, as in `cdfkd run`),
            or by ``label-counts=true`` in its node's configuration.
        min_teachers: fewer usable teachers than this end the run with an error.
        min_available_nodes: with fewer connected nodes, when ``node_wait`` is over, a round is not begun and the run ends with an error; null needs
            as many as ``min_teachers`` does, besides the teachers that may be used again.
        max_teacher_age: rounds for which the last teacher of a silent client is used again.
        broadcast: what later rounds send of the student: all "heads" with their weights, or a "single" distilled one.
        keep_generator: a round's generator starts from that of the round before, in place of random weights; for methods whose generator lasts.
        fraction_train: fraction of the clients that train in a round.
        fraction_evaluate: fraction of the clients that evaluate in a round.
        timeout: seconds to wait for the replies of a round.
        node_wait: seconds to wait for all ``clients.count`` nodes to connect; then a round begins with those that are there.
        transfer_set: a file of synthetic images for a method that takes real ones (`cdfkd distill` only); None is no file.
    """

    rounds: int = 1
    weights: str = "auto"
    min_teachers: int = 1
    min_available_nodes: int | None = None
    max_teacher_age: int = 1
    broadcast: Literal["heads", "single"] = "heads"
    keep_generator: bool = False
    fraction_train: float = 1.0
    fraction_evaluate: float = 1.0
    timeout: float = 3600.0
    node_wait: float = 120.0
    transfer_set: str | None = None

    def __post_init__(self) -> None:
        if self.weights != LABEL_COUNTS and self.weights not in COMPETENCE:
            raise UnknownNameError("server.weights", self.weights, [*COMPETENCE, LABEL_COUNTS])
        require(self, "server", "rounds", "min_teachers", "min_available_nodes", least=1)
        require(self, "server", "max_teacher_age", least=0)
        require(self, "server", "fraction_train", above=0, most=1, why="without teachers there is no student")
        require(self, "server", "fraction_evaluate", least=0, most=1)
        require(self, "server", "timeout", "node_wait", above=0, why="seconds")


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Args:
        backbone: an architecture name.
        max_width: channels to which wide stages are narrowed; None never; "auto" is None for the paper's layouts.
        init: of the trunk: the "average" of the teachers of the student's own architecture, or "random" as in the paper.
        heads: one header "per_teacher", "one" for all, or "plain": the backbone with its own classifier in place of headers, from random
            weights, as papers with one teacher have it. With Flower always "per_teacher".
        stages: how many of the deepest stages enter the headers, at most.

    Raises:
        ConfigError: a setting of headers for a student without any.
    """

    backbone: str = "small_cnn"
    max_width: int | Literal["auto"] | None = "auto"
    init: Init = "average"
    heads: Heads = "per_teacher"
    stages: int = MAX_STAGES

    def __post_init__(self) -> None:
        require(self, "student", "stages", least=1)
        if isinstance(self.max_width, int):
            require(self, "student", "max_width", least=1)
        if self.heads == "plain" and (self.stages, self.max_width) != (MAX_STAGES, "auto"):
            raise ConfigError(
                "student.stages and student.max_width are settings of headers, and student.heads=plain has none; leave them out, or choose another"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    Args:
        study: the group of cells whose results belong in one table.
        cell: the name of this setting within the study.
        seed: of data subset, partition, client training and distillation.
        data: data set and partition.
        clients: local training.
        server: rounds and teacher weights.
        student: the multi-header student.
        method: ``name`` and that method's ``Config`` keys; after construction all of them, with their defaults.
        engine: how the distillation is run.

    Raises:
        ConfigError: an unknown method, or a key or value it does not accept.
    """

    study: str = "adhoc"
    cell: str = "default"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "cdfkd_mfs"})
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in ("study", "cell"):
            value = getattr(self, name)
            if not value or set(value) & set("/\\ ") or value.startswith("."):
                raise ConfigError(f"{name} is {value!r}; accepted: a word that can be a file name")
        name, config = self.method_config()
        object.__setattr__(self, "method", {"name": name, **to_dict(config)})

    def method_config(self) -> tuple[str, Any]:
        """The method's name and an instance of its ``Config``."""
        keys = dict(self.method)
        name = keys.pop("name", None)
        if not isinstance(name, str):
            raise UnknownNameError("method.name", name, METHODS)
        return name, bind(get_method(name).Config, keys, "method")


def config_roots() -> list[Path]:
    """The folders of named configurations: the source tree's, or else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    tree = package.parent / "simulations" / "configs"
    return [tree] if tree.is_dir() else [package / "configs"]


def bench_root() -> Path:
    """The folder of the benches, which are no run configurations."""
    return config_roots()[0] / "bench"


def config_names() -> list[str]:
    """Names of all run configurations, such as ``digits`` or ``fashion_mnist/dir0.5``."""
    found = [(root, path) for root in config_roots() for path in root.rglob("*.yaml")]
    return sorted(str(path.relative_to(root))[: -len(".yaml")] for root, path in found if path.parent != root / "bench")


def bench_names() -> list[str]:
    """Names of all benches, such as ``mnist_methods``."""
    return sorted(path.stem for path in bench_root().glob("*.yaml"))


def find_config(name: str, *folders: Path) -> Path:
    """The file of a configuration.

    Args:
        name: a path to a YAML file, or a name: ``fashion_mnist/dir0.5``, or ``dir0.5`` where that is the only one.
        folders: that are searched first, in this order.

    Raises:
        UnknownNameError: there is none.
        ConfigError: there are several.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        for path in (*(folder / name for folder in folders), Path(name)):
            if path.is_file():
                return path
        raise ConfigError(f"there is no configuration file {name}; named ones: {', '.join(config_names())}")
    for root in (*folders, *config_roots()):
        if (root / f"{name}.yaml").is_file():
            return root / f"{name}.yaml"
    found = [other for other in config_names() if other.rpartition("/")[2] == name]
    if len(found) > 1:
        raise ConfigError(f"the configuration name {name!r} is not unique; accepted: {', '.join(found)}")
    if not found:
        raise UnknownNameError("configuration", name, config_names())
    return find_config(found[0])


def merge(base: Mapping[str, Any], over: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A configuration ``over`` into ``base``, recursively. Another method name starts afresh: its keys are not the old one's."""
    if where == "method" and over.get("name", base.get("name")) != base.get("name"):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value, key) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_config(path: Path, folders: tuple[Path, ...] = (), inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One configuration file as a plain mapping, its ``base`` (another name or path) merged in.

    Args:
        path: of the file.
        folders: where a base is looked for, after the file's own.
        inside: files whose base this is.

    Raises:
        ConfigError: a file is unreadable, or ``base`` leads back to itself.
    """
    path = path.resolve()
    if path in inside:
        raise ConfigError(f"the configuration {path.name} is its own base: {' -> '.join(item.name for item in (*inside, path))}")
    values = load_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    return merge(read_config(find_config(str(base), path.parent, *folders), folders, (*inside, path)), values)


def from_values(values: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Bind a plain mapping with ``key=value`` overrides.

    ``method.name=other`` drops the mapping's keys of the former method.
    """
    return bind(RunConfig, merge(values, override({}, overrides)))


def resolve(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration of a name or path, with overrides.

    Args:
        name: what `find_config` accepts.
        overrides: ``key=value`` with dotted keys; the value is read as YAML.

    Raises:
        ConfigError: the file, a key or a value is not accepted; the message lists what is.
    """
    return from_values(read_config(find_config(name)), overrides)
