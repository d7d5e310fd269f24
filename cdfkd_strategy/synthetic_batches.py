"""Which synthetic images a student sees: fresh ones, those of a generator that is averaged over time, and earlier ones with what teachers said of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdfkd_strategy import parallel
from cdfkd_strategy.config import require
from cdfkd_strategy.errors import ConfigError
from cdfkd_strategy.runtime import Runtime
from cdfkd_strategy.types import TeacherOutputs


@dataclass(frozen=True)
class BatchRecipe:
    """What a student's batch is made of; the defaults are fresh images of the generator, and nothing else.

    Args:
        reuse: student steps on one batch, within an iteration. It and the teachers' answers are computed once.
        average: decay of a moving average of the generator's weights over its steps, as in MAD (arXiv:2209.10359), which
            makes half of the fresh images; 0 is none.
        replay_size: earlier images that are kept, at most, see `Replay`; 0 is none.
        replay_share: of a batch that are earlier images, as soon as there are some that all teachers of the step have answered.
    """

    reuse: int = 1
    average: float = 0.0
    replay_size: int = 0
    replay_share: float = 0.5

    def __post_init__(self) -> None:
        require(self, "method.batches", "reuse", least=1)
        require(self, "method.batches", "replay_size", least=0)
        require(self, "method.batches", "average", least=0, below=1)
        require(self, "method.batches", "replay_share", above=0, below=1)


class Replay:
    """A ring of earlier images with what the teachers said of them, so that none is asked twice; when it is full, the oldest ones give way.

    Images and answers are kept as they were computed, on their device: of every image its pixels, and of every teacher that was ever asked the
    classes (and the features, where they are wanted), times the bytes of the precision.

    Args:
        capacity: images kept at most.
        teachers: ``K``.
        features: keep the teachers' features too.
    """

    def __init__(self, capacity: int, teachers: int, *, features: bool) -> None:
        self.capacity, self.features = capacity, features
        self._rows: dict[str, Tensor] = {}
        self._asked = torch.zeros(0, teachers, dtype=torch.bool)
        self._next = 0

    def __len__(self) -> int:
        return len(self._asked)

    def add(self, images: Tensor, answers: TeacherOutputs, teachers: Sequence[int]) -> None:
        """Store ``images [B, channels, H, W]`` and the answers ``[m, B, ...]`` of m teachers; at most ``capacity`` images."""
        rows = {"images": images, **{f"logits.{teacher}": logits for teacher, logits in zip(teachers, answers.logits, strict=True)}}
        if self.features:
            rows |= {f"features.{teacher}": seen for teacher, seen in zip(teachers, answers.features, strict=True) if seen is not None}
        asked = torch.zeros(len(images), self._asked.shape[1], dtype=torch.bool)
        asked[:, list(teachers)] = True
        first = min(len(images), self.capacity - self._next)  # the others begin anew
        for name, values in rows.items():
            kept = self._rows.setdefault(name, values.new_zeros(self.capacity, *values.shape[1:]))
            kept[self._next : self._next + first] = values[:first]
            kept[: len(values) - first] = values[first:]
        self._asked = torch.cat([self._asked[: self._next], asked[:first], self._asked[self._next + first :]])
        self._asked[: len(asked) - first] = asked[first:]
        self._next = (self._next + len(images)) % self.capacity

    def draw(self, count: int, teachers: Sequence[int], rng: torch.Generator) -> tuple[Tensor, TeacherOutputs] | None:
        """At most ``count`` random images, no one twice, that all of these teachers have answered, with the answers; None if there is none.

        Args:
            count: images.
            teachers: the m teachers whose answers are wanted.
            rng: a CPU generator.
        """
        known = self._asked[:, list(teachers)].all(1).nonzero().flatten()
        positions = known[torch.randperm(len(known), generator=rng)[:count]]
        if not len(positions):
            return None
        there = positions.to(self._rows["images"].device, non_blocking=True)
        logits = torch.stack([self._rows[f"logits.{teacher}"][there] for teacher in teachers])
        features = tuple(None if (kept := self._rows.get(f"features.{teacher}")) is None else kept[there] for teacher in teachers)
        return self._rows["images"][there], TeacherOutputs(logits, features, tuple(None for _ in teachers))

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept."""
        return {"rows": {name: kept[: len(self)].clone() for name, kept in self._rows.items()}, "asked": self._asked.clone(), "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._asked, self._next = state["asked"].clone(), int(state["next"])
        self._rows = {name: torch.cat([kept, kept.new_zeros(self.capacity - len(kept), *kept.shape[1:])]) for name, kept in state["rows"].items()}


class SyntheticBatches:
    """Makes a student's batches after a recipe.

    Args:
        generator: trained elsewhere, in place; sampled in train mode.
        recipe: what a batch is made of.
        size: ``B``, images per batch.
        teachers: ``K``.
        features: are the teachers' features wanted, too?
        runtime: where images go.

    Raises:
        ConfigError: an average or a replay on several processes, which would each have other images.
    """

    def __init__(self, generator: nn.Module, recipe: BatchRecipe, size: int, teachers: int, runtime: Runtime, *, features: bool = True) -> None:
        if parallel.size() > 1 and (recipe.average or recipe.replay_size):
            raise ConfigError("method.batches.average and method.batches.replay_size need one process; set both to 0")
        self.generator, self.recipe, self.size, self.runtime = generator, recipe, size, runtime
        self.averaged = copy.deepcopy(generator).requires_grad_(False) if recipe.average else None
        self.replay = Replay(max(recipe.replay_size, size), teachers, features=features) if recipe.replay_size else None

    @torch.no_grad()
    def next(self, ask: Callable[[Tensor], TeacherOutputs], teachers: Sequence[int], rng: torch.Generator) -> tuple[Tensor, TeacherOutputs]:
        """Normalised images ``[B, channels, H, W]`` without a graph, and what the teachers of a step say of them.

        Args:
            ask: these teachers: images to their logits and features.
            teachers: who they are.
            rng: a CPU generator.
        """
        if self.replay is None:
            fresh = self._fresh(self.size, rng)
            return fresh, ask(fresh)
        most = min(round(self.size * self.recipe.replay_share), self.size - 2)  # BatchNorm needs two fresh ones
        earlier = self.replay.draw(most, teachers, rng)
        fresh = self._fresh(self.size - (0 if earlier is None else len(earlier[0])), rng)
        answers = ask(fresh)
        self.replay.add(fresh, answers, teachers)
        if earlier is None:
            return fresh, answers
        images, known = earlier
        features = tuple(None if old is None or new is None else torch.cat([new, old]) for new, old in zip(answers.features, known.features, strict=True))
        answers = TeacherOutputs(torch.cat([answers.logits, known.logits], 1), features, known.bn)
        return self.runtime.images(torch.cat([fresh, images])), answers

    def _fresh(self, count: int, rng: torch.Generator) -> Tensor:
        z = self.runtime.normal(count, int(self.generator.latent_dim), rng=rng)  # type: ignore[arg-type]
        if self.averaged is None:
            return self.runtime.images(self.generator(z))
        now, past = z.tensor_split(2)
        self.averaged.train()
        return self.runtime.images(torch.cat([self.generator(now), self.averaged(past)]))

    def generator_started(self) -> None:
        """To be called when the generator was filled: the average begins there."""
        if self.averaged is not None:
            self.averaged.load_state_dict(self.generator.state_dict())

    @torch.no_grad()
    def generator_moved(self) -> None:
        """To be called after every step of the generator: the average follows; of its buffers it takes the latest."""
        if self.averaged is None:
            return
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.generator.parameters()), 1 - self.recipe.average)
        for mine, latest in zip(self.averaged.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(latest)

    def state_dict(self) -> dict[str, Any]:
        """The averaged generator and the earlier images, where there are any."""
        state: dict[str, Any] = {}
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        if self.replay is not None:
            state["replay"] = self.replay.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])
