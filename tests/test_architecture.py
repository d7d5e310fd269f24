"""The map of the README and of the house rules, held by reading the sources: who imports whom, and how long files are."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "cdfkd_strategy"

# A module may import modules of its own level and of lower ones. A package's level is that of all modules in it.
LEVELS = {
    "child_process": 0, "directory_lock": 0,
    "types": 0, "errors": 0, "registry": 0, "config": 0, "seeding": 0, "precision": 0, "freed_memory": 0,
    "compiled_networks": 0, "runtime": 0, "schedules": 0, "parallel": 0,
    "losses": 1, "models": 1, "data": 1, "checkpoint": 1, "history": 1, "term_means": 1, "progress": 1, "provenance": 1,
    "teachers": 2, "teacher_forms": 2, "teacher_shards": 2, "teacher_draw": 2, "synthetic_batches": 2,
    "competence": 2, "local_training": 2, "metrics": 2, "teacher_directory": 2, "student_io": 2, "single_header": 2,
    "averaging": 2, "warm_start": 2, "step_counter": 2,
    "distiller": 3, "pool_distillation": 3, "image_optimisation": 3,
    "methods": 4, "collapse": 4,
    "engine": 5, "engine_config": 5,
    "run_config": 6, "harness": 6, "summary": 6, "offline": 6, "pictures": 6, "report": 6, "bench": 6,
    "flower": 7,
    "cli": 8, "__main__": 8,
}  # fmt: skip

MAY_NAME_FLOWER = ("flower",)
PUBLIC_FLOWER = ("flwr.app", "flwr.clientapp", "flwr.common", "flwr.serverapp", "flwr.simulation")
"""Of Flower's ``flwr.common`` only the logger."""
FILE_BUDGET = 320  # the house rule says about 300
FUNCTION_BUDGET = 45
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    """The first part of a module's name inside the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, *, deferred: bool = True) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Every imported module, the names taken from it, and the line. ``deferred`` includes imports inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not deferred and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, (), node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            yield node.module or "", tuple(name.name for name in node.names), node.lineno


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules of this package that a file imports, as dotted names without the package's."""
    for name, taken, line in imports(path):
        if name == "cdfkd_strategy":
            for item in taken:
                if (PACKAGE / f"{item}.py").exists() or (PACKAGE / item).is_dir():
                    yield item, line
        elif name.startswith("cdfkd_strategy."):
            yield name.removeprefix("cdfkd_strategy."), line


def test_every_module_has_a_level() -> None:
    unknown = {top(path) for path in modules()} - set(LEVELS) - {"__init__"}
    assert not unknown, f"give {sorted(unknown)} a level here, and a line in the README's map"


def test_imports_point_downwards() -> None:
    upward = []
    for path in modules():
        if path == PACKAGE / "__init__.py":  # the list of public names: imports them on first use
            continue
        for name, line in own_imports(path):
            target = name.partition(".")[0]
            if LEVELS[target] > LEVELS[top(path)]:
                upward.append(f"{path.relative_to(REPOSITORY)}:{line} (level {LEVELS[top(path)]}) imports {name} (level {LEVELS[target]})")
    assert not upward, "\n".join(upward)


def test_models_and_data_do_not_know_each_other() -> None:
    crossing = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in modules()
        for name, line in own_imports(path)
        if {top(path), name.partition(".")[0]} == {"models", "data"}
    ]
    assert not crossing, "\n".join(crossing)


def test_methods_do_not_import_one_another() -> None:
    names = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    assert names, "there are no methods"
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.stem == "__init__":
            continue
        for name, line in own_imports(path):
            other = name.removeprefix("methods").strip(".").partition(".")[0]
            taken_from_methods = name.partition(".")[0] == "methods"
            assert not taken_from_methods or other in ("", path.stem), f"{path.name}:{line} imports the method {other}"
    for path in (PACKAGE / "methods").glob("*.py"):
        for name, taken, line in imports(path):
            assert path.stem == "__init__" or name != "cdfkd_strategy.methods" or not set(taken) & names, f"{path.name}:{line} imports a method"


def test_flower_stays_in_its_room() -> None:
    for path in modules():
        for name, taken, line in imports(path):
            if name.partition(".")[0] not in ("flwr", "ray"):
                continue
            where = f"{path.relative_to(REPOSITORY)}:{line}"
            assert top(path) in MAY_NAME_FLOWER, f"{where} imports {name} outside {MAY_NAME_FLOWER}"
            if name.startswith("flwr"):
                assert name in PUBLIC_FLOWER or any(name.startswith(f"{public}.") for public in PUBLIC_FLOWER), f"{where} imports {name}, not public"
                assert name != "flwr.common" or set(taken) <= {"log"}, f"{where} imports {taken} from flwr.common"


@pytest.mark.parametrize("folder", ["server", "clients"])
def test_apps_only_assign(folder: str) -> None:
    paths = list((REPOSITORY / folder).glob("*_app.py"))
    assert paths, f"{folder}/ has no app"
    for path in paths:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assigned = [node for node in body if isinstance(node, ast.Assign)]
        assert [ast.unparse(node.targets[0]) for node in assigned] == ["app"]
        rest = [node for node in body if not isinstance(node, ast.Assign | ast.Import | ast.ImportFrom | ast.Expr)]
        assert not rest, f"{path} does more than import and assign: {ast.unparse(rest[0])}"


def test_importing_the_library_needs_no_heavy_extra() -> None:
    """matplotlib, scikit-learn and torchvision's data sets are imported where they are used."""
    for path in modules():
        for name, _, line in imports(path, deferred=False):
            heavy = name.partition(".")[0] in ("matplotlib", "sklearn")
            guarded = heavy and _is_type_checking(path, line)
            assert not heavy or guarded, f"{path.relative_to(REPOSITORY)}:{line} imports {name} at module level; it is an optional extra"


def _is_type_checking(path: Path, line: int) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return any(node.lineno <= line <= (node.end_lineno or 0) for node in blocks)


def test_nothing_unpickles_or_evaluates() -> None:
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "pickle.load", "pickle.loads", "yaml.load"), f"{path}:{node.lineno} calls {called}"
        assert "pickle" not in [name.partition(".")[0] for name, _, _ in imports(path)], path


def test_file_and_function_budgets() -> None:
    too_long = []
    for path in modules():
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > FILE_BUDGET:
            too_long.append(f"{path.relative_to(REPOSITORY)} has {lines} lines; at most {FILE_BUDGET}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                if length > FUNCTION_BUDGET:
                    too_long.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name} has {length} lines of code; at most {FUNCTION_BUDGET}")
    assert not too_long, "\n".join(too_long)


def test_files_are_named_by_a_noun() -> None:
    assert not [path for path in modules() if path.stem in FORBIDDEN_NAMES]


def test_public_names_exist() -> None:
    import cdfkd_strategy

    assert 8 <= len(cdfkd_strategy._HOME) <= 14
    for name, home in cdfkd_strategy._HOME.items():
        assert getattr(cdfkd_strategy, name).__module__ == f"cdfkd_strategy.{home}"
    with pytest.raises(AttributeError, match="public names"):
        _ = cdfkd_strategy.no_such_name


def test_imports_are_declared_dependencies() -> None:
    """What the wheel imports is what pip installs with it: core at any place, extras only inside functions."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def modules_of(requirements: list[str]) -> set[str]:
        names = [re.split(r"[<>=!~\[; ]", requirement)[0].lower() for requirement in requirements]
        return {{"pyyaml": "yaml", "grpcio": "grpc", "scikit-learn": "sklearn"}.get(name, name) for name in names}

    core, extra = modules_of(project["dependencies"]), modules_of(project["optional-dependencies"]["simulation"])
    brought_along = {"PIL": "torchvision"}
    for path in modules():
        at_top = {name.partition(".")[0] for name, _, line in imports(path, deferred=False) if not _is_type_checking(path, line)}
        anywhere = {name.partition(".")[0] for name, _, _ in imports(path)}
        for names, allowed in ((at_top, core), (anywhere, core | extra)):
            foreign = {name for name in names if name not in sys.stdlib_module_names and name != "cdfkd_strategy"}
            undeclared = {name for name in foreign if brought_along.get(name, name) not in allowed}
            assert not undeclared, f"{path.relative_to(REPOSITORY)} imports {sorted(undeclared)}; declare it in pyproject.toml, or defer it if it is an extra"
