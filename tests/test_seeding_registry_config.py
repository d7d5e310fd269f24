"""The vocabulary at the bottom: configuration binding, registries, seeds, image specs."""

from __future__ import annotations

import dataclasses
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from cdfkd_strategy import seeding
from cdfkd_strategy.config import bind, load_yaml, override, require, to_dict
from cdfkd_strategy.errors import CDFKDError, ConfigError, UnknownNameError
from cdfkd_strategy.methods import get_method
from cdfkd_strategy.registry import Registry
from cdfkd_strategy.types import ImageSpec, Needs

# -- config ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    name: str = "iid"
    alpha: float = 0.5


@dataclass(frozen=True)
class Outer:
    count: int = 3
    rate: float = 0.1
    quiet: bool = False
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    width: int | Literal["auto"] | None = "auto"
    names: tuple[str, ...] = ("x",)
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, Any] = field(default_factory=dict)
    where: Path | str = "here"

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count is {self.count}; accepted: 0 or more")


def test_bind_of_nothing_is_the_default() -> None:
    assert bind(Outer, {}) == Outer()


def test_bind_is_the_inverse_of_to_dict() -> None:
    config = Outer(count=7, limit=2.0, width=64, names=("p", "q"), inner=Inner("dirichlet", 0.1), extra={"deep": [1, {"k": None}]})
    assert bind(Outer, to_dict(config)) == config


def test_to_dict_is_plain() -> None:
    values = to_dict({"path": Path("a/b"), "config": Inner(), "pair": (1, 2), 3: "three"})
    assert values == {"path": "a/b", "config": {"name": "iid", "alpha": 0.5}, "pair": [1, 2], "3": "three"}


def test_bind_nested_and_partial() -> None:
    bound = bind(Outer, {"inner": {"alpha": 1}, "names": ["u", "v"]})
    assert bound.inner == Inner("iid", 1.0)
    assert isinstance(bound.inner.alpha, float)
    assert bound.names == ("u", "v")


@dataclass(frozen=True)
class Twice:
    outer: Outer = field(default_factory=lambda: Outer(count=7, inner=Inner("dirichlet", 0.1)))
    plain: Inner | None = None


def test_what_a_nested_mapping_does_not_say_is_as_in_the_fields_own_default() -> None:
    """Half the width of a method's generator is not another generator."""
    assert bind(Twice, {"outer": {"inner": {"alpha": 9}}}).outer == Outer(count=7, inner=Inner("dirichlet", 9.0))
    assert bind(Twice, {"plain": {"alpha": 9}}).plain == Inner("iid", 9.0)
    assert bind(get_method("cmi").Config, {"generator": {"width": 0.5}}).generator.output == "sigmoid"
    with pytest.raises(ConfigError, match=r"unknown key outer\.inner\.beta"):
        bind(Twice, {"outer": {"inner": {"beta": 1}}})


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"cuont": 1}, ["unknown key cuont", "count", "rate", "inner"]),
        ({"inner": {"beta": 1}}, ["unknown key inner.beta", "accepted under inner", "name, alpha"]),
        ({"inner": 3}, ["inner is 3", "a mapping", "name, alpha"]),
        ({"count": "three"}, ["count is 'three' (str)", "accepted: int"]),
        ({"count": True}, ["count is True", "int"]),
        ({"count": 1.5}, ["count is 1.5", "int"]),
        ({"quiet": 1}, ["quiet is 1", "bool"]),
        ({"quiet": "yes"}, ["quiet is 'yes'", "bool"]),
        ({"rate": "fast"}, ["rate is 'fast'", "float"]),
        ({"rate": None}, ["rate is None", "float"]),
        ({"kind": "c"}, ["kind is 'c'", "'a', 'b'"]),
        ({"width": "wide"}, ["width is 'wide'", "int", "'auto'"]),
        ({"names": "x"}, ["names is 'x'"]),
        ({"names": ["x", 2]}, ["names[1] is 2", "str"]),
        ({"extra": 4}, ["extra is 4"]),
        ({"count": -1}, ["count is -1"]),
    ],
)
def test_bind_errors_say_what_came_and_what_is_accepted(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(Outer, values)
    assert not [part for part in parts if part not in str(caught.value)]


def test_bind_says_where_it_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown key method\.inner\.beta"):
        bind(Outer, {"inner": {"beta": 1}}, "method")


@pytest.mark.parametrize(
    ("values", "bounds", "error"),
    [
        ([0, 3, 0.5, None], {"least": 0}, None),
        ([1e-9, 1.0], {"above": 0, "most": 1}, None),
        ([-1], {"least": 0}, "part.last is -1; accepted: at least 0"),
        ([1, 0.0], {"above": 0, "why": "it divides"}, "part.last is 0.0; accepted: above 0 (it divides)"),
        ([1.5], {"least": 0, "most": 1}, "part.last is 1.5; accepted: at least 0 and at most 1"),
        ([1], {"above": 0, "below": 1}, "part.last is 1; accepted: above 0 and below 1"),
        ([math.nan], {"least": 0}, "part.last is nan; accepted: a finite number, at least 0"),
        ([math.inf], {"least": 0}, "part.last is inf; accepted: a finite number, at least 0"),
        (["all"], {"least": 0}, "part.last is 'all'; accepted: a number, at least 0"),
    ],
)
def test_numbers_are_required_to_be_finite_and_within_bounds(values: list[Any], bounds: dict[str, Any], error: str | None) -> None:
    names = [*(f"value{number}" for number in range(len(values) - 1)), "last"]
    config = SimpleNamespace(**dict(zip(names, values, strict=True)))
    with nullcontext() if error is None else pytest.raises(ConfigError, match=f"^{re.escape(error)}$"):
        require(config, "part", *names, **bounds)


def test_a_required_number_at_the_top_level_has_no_prefix() -> None:
    with pytest.raises(ConfigError, match=r"^rounds is 0; accepted: at least 1$"):
        require(SimpleNamespace(rounds=0), "", "rounds", least=1)


def test_bind_of_a_missing_required_key() -> None:
    @dataclass(frozen=True)
    class Required:
        needed: int

    with pytest.raises(ConfigError, match="needed"):
        bind(Required, {})


def test_bind_reads_yaml_scientific_notation(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("rate: 1e-3\nlimit: null\nwidth: auto\n", encoding="utf-8")
    values = load_yaml(path)
    assert values["rate"] == "1e-3"  # YAML 1.1 wants a dot; a user does not
    assert bind(Outer, values) == Outer(rate=0.001)


@pytest.mark.parametrize(("text", "message"), [("- a\n", "holds a list"), ("a: [", "not YAML"), ("just words", "holds a str")])
def test_load_yaml_refuses_what_is_not_a_mapping(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_yaml(path)


def test_load_yaml_refuses_what_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not YAML: .*codec"):
        load_yaml(path)


def test_load_yaml_builds_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not YAML"):
        load_yaml(path)


def test_load_yaml_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("# only a comment\n", encoding="utf-8")
    assert load_yaml(path) == {}
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_yaml(tmp_path / "missing.yaml")


def test_override_dotted_values_are_yaml() -> None:
    values = {"method": {"name": "rdskd", "epochs": 5}, "seed": 0}
    changed = override(values, ["method.epochs=6", "method.milestones=[1, 2]", "data.name=digits", "seed=1", "clients.lr=1e-3", "quiet=true", "path=a=b"])
    assert changed == {
        "method": {"name": "rdskd", "epochs": 6, "milestones": [1, 2]},
        "seed": 1,
        "data": {"name": "digits"},
        "clients": {"lr": "1e-3"},
        "quiet": True,
        "path": "a=b",
    }
    assert values == {"method": {"name": "rdskd", "epochs": 5}, "seed": 0}


@pytest.mark.parametrize(("item", "message"), [("epochs", "key=value"), ("=3", "key=value"), ("seed.deep=1", "plain value")])
def test_override_errors(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"seed": 0}, [item])


def test_registry() -> None:
    table: Registry[object] = Registry("fruit")
    pear = table.add("pear", object())
    apple = table.register("apple")(object())
    assert (table["pear"], table["apple"]) == (pear, apple)
    assert list(table) == ["apple", "pear"]
    assert len(table) == 2
    assert "pear" in table
    assert "plum" not in table


def test_registry_refuses_a_second_object_under_one_name() -> None:
    table: Registry[object] = Registry("fruit")
    pear = table.add("pear", object())
    assert table.add("pear", pear) is pear  # importing a module twice is fine
    with pytest.raises(ConfigError, match="fruit 'pear' is registered twice"):
        table.add("pear", object())
    assert table["pear"] is pear


def test_an_unknown_name_lists_the_known_ones() -> None:
    table: Registry[int] = Registry("fruit")
    table.add("pear", 1)
    table.add("apple", 2)
    with pytest.raises(UnknownNameError, match="unknown fruit 'plum'; accepted: apple, pear"):
        table["plum"]
    assert issubclass(UnknownNameError, ConfigError)
    assert issubclass(ConfigError, CDFKDError)
    assert issubclass(ConfigError, ValueError)


# -- seeding -----------------------------------------------------------------------------------------------------


def test_derived_seeds_are_golden() -> None:
    # Committed results depend on these numbers: the first 16 digits of `printf '...' | sha256sum`, halved.
    assert seeding.derive_seed() == 0xE3B0C44298FC1C14 >> 1  # the empty string
    assert seeding.derive_seed("teacher", 3, 7) == 0x0ED3783DA919A3CD >> 1  # 'str:teacher\\x1fint:3\\x1fint:7'


def test_derived_seeds_depend_on_every_part_its_type_and_the_order() -> None:
    variants = [("a", 1), (1, "a"), ("a", "1"), ("a1",), ("a", 1, 0), ("a", 2), ("b", 1), ("a", "", 1)]
    seeds = {seeding.derive_seed(*parts) for parts in variants}
    assert len(seeds) == len(variants)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_repeat() -> None:
    first, again, other = (torch.randn(4, generator=seeding.generator("z", seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert seeding.numpy_rng("z", 1).integers(1 << 40) == seeding.numpy_rng("z", 1).integers(1 << 40)


def test_seeded_scope_restores_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with seeding.seeded_scope("init", 0):
        inside = torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
    with seeding.seeded_scope("init", 0):
        assert torch.equal(torch.randn(3), inside)
    with pytest.raises(KeyError), seeding.seeded_scope("init", 1):
        raise KeyError
    with seeding.seeded_scope("init", 1):
        assert not torch.equal(torch.randn(3), inside)


def test_threads_are_restored_even_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with seeding.threads(1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [1]
    assert torch.get_num_threads() == before


# -- types -------------------------------------------------------------------------------------------------------


def test_normalise_by_hand_and_back() -> None:
    image = ImageSpec(3, 4, 4, 10, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    pixels = torch.full((1, 3, 4, 4), 0.75)
    assert image.normalise(pixels)[0, :, 0, 0].tolist() == [0.5, 2.0, 0.375]
    random = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(image.to_pixels(image.normalise(random)), random)


def test_to_pixels_clamps() -> None:
    image = ImageSpec(1, 4, 4, 2)
    assert image.to_pixels(torch.full((1, 1, 4, 4), 9.0)).max() == 1
    assert image.to_pixels(torch.full((1, 1, 4, 4), -9.0)).min() == 0


def test_one_mean_serves_all_channels() -> None:
    image = ImageSpec(3, 4, 4, 2, mean=(0.5,), std=(0.25,))
    assert torch.equal(image.normalise(torch.ones(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 2.0))
    assert image.shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 2}, "channels are 2; accepted: 1 or 3"),
        ({"height": 3}, "3x8 pixels"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"mean": (0.1, 0.2)}, "mean has 2 values"),
        ({"std": (0.0,)}, "std is"),
    ],
)
def test_image_spec_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ImageSpec(1, 8, 8, 10), **change)


def test_image_spec_survives_json() -> None:
    image = ImageSpec(3, 8, 8, 10, mean=(0.1, 0.2, 0.3), std=(1.0,))
    assert bind(ImageSpec, to_dict(image)) == image


def test_needs_disclose_in_field_order() -> None:
    assert Needs().disclosed() == ()
    assert Needs(label_counts=True, batch_norm=True).disclosed() == ("batch_norm", "label_counts")


@pytest.mark.parametrize("item", ["study=[a", "cell=@x"])
def test_an_override_that_is_not_yaml_is_a_clear_error(item: str) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        override({}, [item])


def test_the_share_that_is_no_pixel() -> None:
    image = ImageSpec(1, 4, 4, 10, mean=(0.5,), std=(0.25,))
    images = torch.tensor([-2.0, -2.001, -2.1, 0.0, 1.9, 2.0, 2.1, 9.0])
    assert image.share_outside(images.view(1, 1, 2, 4)) == 3 / 8  # -2.001 is black, as far as eight bits go
