"""The strategy's settings: checked once, compared on resume, and listed with what they disclose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from flwr.app import MetricRecord, RecordDict
from torch import nn

from cdfkd_strategy.competence import COMPETENCE, LABEL_COUNTS
from cdfkd_strategy.config import bind, require, to_dict
from cdfkd_strategy.distiller import METHODS, Distiller
from cdfkd_strategy.engine_config import EngineConfig
from cdfkd_strategy.errors import ConfigError, NeedsError, UnknownNameError
from cdfkd_strategy.flower.architectures import architecture_name
from cdfkd_strategy.flower.disclosure import ALWAYS, ATTENTION, EVALUATED, FAILED, LATER, OPTED_IN, needed
from cdfkd_strategy.flower.payload import Keys
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.types import ImageSpec
from cdfkd_strategy.warm_start import Init, check_student

MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]

NO_RESULT = {
    *("engine", "watch", "run_dir", "resume", "node_wait", "identify", "keys", "train_metrics", "evaluate_metrics"),
    *("min_teachers", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes", "expected_nodes"),
}
"""Settings that may differ when a run is continued: they do not change what is computed of what clients send."""


@dataclass(frozen=True)
class Options:
    """What `CDFKDStrategy` was given; its docstring says what each setting is.

    Raises:
        ConfigError: a value is not accepted.
        ArchitectureError: the student has no stages at this image size.
        NeedsError: the method needs something that the clients of this strategy do not send.
    """

    image: ImageSpec
    architecture: str | Callable[[], nn.Module]
    architectures: tuple[str, ...] | None
    student: str
    student_max_width: int | Literal["auto"] | None
    student_init: Init
    student_stages: int
    method: str | type[Distiller]
    method_config: Any
    weights: str
    engine: EngineConfig
    seed: int
    watch: Callable[..., Any] | None
    run_dir: Path | None
    resume: bool
    min_teachers: int
    max_teacher_age: int
    broadcast: Literal["heads", "single"]
    single_steps: int
    keep_generator: bool
    identify: bool | None
    node_wait: float
    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int | None
    expected_nodes: int | None
    keys: Keys
    train_metrics: MetricsAggregation
    evaluate_metrics: MetricsAggregation

    def __post_init__(self) -> None:
        if self.weights != LABEL_COUNTS and self.weights not in COMPETENCE:
            raise UnknownNameError("weights", self.weights, [*COMPETENCE, LABEL_COUNTS])
        if self.broadcast not in ("heads", "single"):
            raise ConfigError(f"broadcast is {self.broadcast!r}; accepted: 'heads', 'single'")
        require(self, "", "fraction_train", above=0, most=1, why="without teachers there is no student")
        require(self, "", "fraction_evaluate", least=0, most=1)
        require(self, "", "min_teachers", "single_steps", "student_stages", "min_train_nodes", "min_available_nodes", "expected_nodes", least=1)
        require(self, "", "max_teacher_age", "min_evaluate_nodes", least=0)
        check_student(self.student, self.image, max_width=self.student_max_width, init=self.student_init, stages=self.student_stages)
        object.__setattr__(self, "method_config", _bound(self.distiller, self.method_config))
        if self.keep_generator and not self.distiller.generator_lasts:
            lasting = ", ".join(name for name in METHODS if METHODS[name].generator_lasts)
            raise ConfigError(f"keep_generator is set, but method {self.distiller.name!r} has no generator that outlives a round; accepted with it: {lasting}")
        needs = self.distiller.needs
        if needs.label_counts and self.weights != LABEL_COUNTS:
            raise NeedsError(f"method {self.distiller.name!r} needs the clients' label counts; accepted with it: weights={LABEL_COUNTS!r}, which asks for them")
        if needs.proxy_data or needs.aggregated_weights:
            raise NeedsError(
                f"method {self.distiller.name!r} needs {', '.join(needs.disclosed())}; this strategy has client weights only, choose another method"
            )

    @property
    def distiller(self) -> type[Distiller]:
        """The method's class."""
        return get_method(self.method) if isinstance(self.method, str) else self.method

    @property
    def label_counts(self) -> bool:
        """Are clients asked for their label counts?"""
        return self.weights == LABEL_COUNTS

    def settings(self) -> dict[str, Any]:
        """Plain values of everything on which the result depends."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in NO_RESULT}
        named = {"method": self.distiller.name, "architecture": architecture_name(self.architecture)}
        return {**{key: to_dict(value) for key, value in values.items()}, **named}

    def run_config(self) -> dict[str, Any]:
        """The settings as a run configuration, for a strategy that was not made from one: what `cdfkd distill` goes by on its uploads."""
        named = {"architectures": [self.architecture]} if isinstance(self.architecture, str) else {}
        student = {"backbone": self.student, "max_width": self.student_max_width, "init": self.student_init, "stages": self.student_stages}
        method = {"name": self.distiller.name, **to_dict(self.method_config)}
        own = {"data": {"name": None, "image": to_dict(self.image)}, "clients": named, "server": {"weights": self.weights}}
        return {"seed": self.seed, **own, "student": student, "method": method, "engine": to_dict(self.engine)}

    def disclosures(self, num_rounds: int) -> list[str]:
        """What leaves the clients, and what clients see of one another, in words."""
        needs = self.distiller.needs
        found = [f"every client's teacher: {'; '.join(ALWAYS.values())} (to the server)"]
        if needs.disclosed():
            found.append(f"of these, the method needs: {', '.join(needed(needs))}")
        if self.label_counts:
            found.append(f"{', '.join(OPTED_IN.values())} of every client (to the server; opted in by weights='label_counts')")
        if num_rounds > 1:
            found.append(f"from round 2 on: {'; '.join(LATER.values())} (to the server)")
            found.append("every client's last teacher (back to the client, as which any node counts that says so and was no other client before)")
        if self.fraction_evaluate > 0:
            fitted = ATTENTION.values() if self.broadcast == "heads" else ()
            found.append(f"every client that evaluates: {'; '.join((*EVALUATED.values(), *fitted))} (to the server)")
        found.append(f"a client that fails: {FAILED} (to the server)")
        if num_rounds > 1 or self.fraction_evaluate > 0:
            heads = "the student with one header per client, and the class weights of all clients"
            sent = heads if self.broadcast == "heads" else "the student with a single header distilled from all"
            found.append(f"{sent} (to every client{'' if num_rounds > 1 else ' that evaluates'})")
        return found


def _bound(method: type[Distiller], config: Any) -> Any:
    if config is None:
        return method.Config()
    if isinstance(config, Mapping):
        return bind(method.Config, config, "method_config")
    if isinstance(config, method.Config):
        return config
    raise ConfigError(f"method_config is a {type(config).__name__}; accepted: {method.Config.__name__}, a mapping of its keys, or None")
