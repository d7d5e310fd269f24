"""The wheel holds one package, and works far from the source tree; so does Flower's app bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def cdfkd(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh environment that holds this wheel, and sees the dependencies of the running one."""
    venv = tmp_path_factory.mktemp("venv") / "v"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    paths = sysconfig.get_paths()
    (site_packages / "zz_dependencies.pth").write_text("\n".join({paths["purelib"], paths["platlib"]}) + "\n", encoding="utf-8")
    return venv / "bin" / "cdfkd"


def call(command: list[object], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_top_level_names_are_exactly_the_package(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"cdfkd_strategy"}


def test_the_wheel_holds_all_sources_configurations_and_the_licence(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "cdfkd_strategy").rglob("*.py")}
    configs = REPOSITORY / "simulations" / "configs"
    packaged = {f"cdfkd_strategy/configs/{path.relative_to(configs)}" for path in configs.rglob("*.yaml")}
    assert sources | packaged | {"cdfkd_strategy/py.typed"} <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not [name for name in held if name.endswith((".safetensors", ".npz", ".png"))]


def test_the_installed_command_runs_from_an_empty_directory(cdfkd: Path, tmp_path: Path) -> None:
    code = "import cdfkd_strategy; print(cdfkd_strategy.__file__); from cdfkd_strategy.cli import main; "
    code += "print([main(['config', *name]) for name in ([], ['digits'], ['fashion_mnist/dir0.1-rounds3'])])"
    shown = call([cdfkd.parent / "python", "-c", code], tmp_path)
    assert shown.startswith(str(cdfkd.parents[1])), "the source tree was imported, not the wheel"
    assert "fashion_mnist/dir0.5" in shown.split()
    assert "cell: dir0.1-rounds3" in shown
    assert shown.endswith("[0, 0, 0]\n"), "a configuration, or its base, was not found in the package"
    tiny = ["clients.count=1", "clients.epochs=1", "data.train_size=100", "data.partition.name=iid"]
    call([cdfkd, "teachers", "digits", *tiny, "--out", "t"], tmp_path)
    method = ["method.epochs=1", "method.iterations=1", "method.student_steps=1", "method.batch_size=8", "method.generator.width=0.25"]
    shown = call([cdfkd, "distill", "--teachers", "t", *method, "--out", "run"], tmp_path)
    assert "student, merged" in shown
    assert (tmp_path / "run" / "summary.json").exists()


def test_flower_bundles_the_app(tmp_path: Path) -> None:
    """`flwr build` takes sources and configurations, and nothing that is large or private."""
    flwr = Path(sys.executable).with_name("flwr")
    checkout = tmp_path / "app"  # a copy, because Flower refuses some names of the folder, and a checkout may have any
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "runs", "dist", "build"))
    (checkout / "runs").mkdir()
    (checkout / "runs" / "private.npz").write_bytes(b"images")
    call([flwr, "build", "--app", checkout], tmp_path)
    (bundle,) = tmp_path.glob("*.fab")
    held = set(zipfile.ZipFile(bundle).namelist())
    size = bundle.stat().st_size
    app = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert set(app["config"]) == {"config", "overrides", "out"}
    for component in app["components"].values():
        assert f"{component.partition(':')[0].replace('.', '/')}.py" in held
    assert {"cdfkd_strategy/flower/strategy.py", "simulations/configs/digits.yaml", "pyproject.toml"} <= held
    strange = {name for name in held if name.partition("/")[0] not in ("cdfkd_strategy", "server", "clients", "simulations", ".info")}
    assert strange <= {"pyproject.toml", "README.md", "LICENSE"}
    assert {Path(name).suffix for name in held if name.startswith("simulations/")} == {".yaml", ".md"}
    assert size < 1_500_000  # all of it text; with the committed teachers it would be 3 MB
