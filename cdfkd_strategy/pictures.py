"""Pictures of a run, drawn from its directory alone: accuracy, losses, synthetic images, label distribution, confusion."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cdfkd_strategy.checkpoint import load_tensors
from cdfkd_strategy.data.datasets import ImageData, load_data
from cdfkd_strategy.engine import SYNTHETIC_FILE
from cdfkd_strategy.errors import CDFKDError, CheckpointError, MissingExtraError
from cdfkd_strategy.harness import Harness, confusion_matrix
from cdfkd_strategy.history import read_losses
from cdfkd_strategy.models.head_fusion import FusedStudent
from cdfkd_strategy.run_config import RunConfig
from cdfkd_strategy.student_io import load_student
from cdfkd_strategy.summary import discloses_counts, read_summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

DPI = 100
MAX_NAMES = 25
"""Classes above which class names are left off the axes."""
LINES = {
    "fedavg": ("one-shot FedAvg", "tab:gray"),
    "ensemble_uniform": ("ensemble, uniform", "tab:orange"),
    "ensemble_estimated": ("ensemble, estimated", "tab:green"),
    "ensemble_oracle": ("ensemble, oracle", "tab:purple"),
}


def draw_pictures(run_dir: Path, config: RunConfig, data: ImageData | None) -> list[Path]:
    """Draw what the files in a run directory allow.

    Args:
        run_dir: with ``losses.csv``, ``synthetic.safetensors``, ``student.safetensors``, ``summary.json``; missing ones leave out their pictures.
        config: of the run.
        data: its data set (`images_of`); None leaves out the label distribution and the confusion matrix.

    Returns:
        The PNG files, in ``run_dir``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    _figure()
    pictures = []
    history = read_losses(run_dir / "losses.csv")
    if history:
        pictures += [_accuracy(run_dir, history), _losses(run_dir, history)]
    student = _student(run_dir)
    if student is not None and (run_dir / SYNTHETIC_FILE).exists():
        pictures.append(_synthetic(run_dir, student, data))
    if data is not None:
        pictures.append(_labels(run_dir, config, data))
    if data is not None and student is not None and student.image == data.image:
        pictures.append(_confusion(run_dir, student, data))
    return [path for path in pictures if path is not None]


def _figure(width: float = 7.0, height: float = 4.0) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing pictures", "simulation") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None})
    return path


def _student(run_dir: Path) -> FusedStudent | None:
    try:
        return load_student(run_dir)
    except CheckpointError as error:
        logger.info("no pictures of the student: %s", error)
        return None


def images_of(config: RunConfig) -> ImageData | None:
    """The data set of a run, or None (and why, in the log) if it is not at hand."""
    try:
        return load_data(config.data, config.seed)
    except CDFKDError as error:
        logger.info("no label distribution and no confusion matrix: %s", error)
        return None


def _plot(axes: Axes, history: Sequence[dict[str, float]], key: str, label: str, colour: str | None = None) -> None:
    points = [(index + 1, row[key]) for index, row in enumerate(history) if key in row]
    axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="." if len(points) < 20 else None)
    axes.locator_params(axis="x", integer=True)


def _accuracy(run_dir: Path, history: list[dict[str, float]]) -> Path | None:
    """Accuracies while distilling, over the lines of what the teachers give; None if nothing was evaluated."""
    keys = list(dict.fromkeys(key for row in history for key in row if key.startswith("test/")))
    if not keys:
        return None
    figure = _figure()
    axes = figure.subplots()
    for key, colour in zip(keys, ("tab:blue", "tab:cyan", "tab:red"), strict=False):
        _plot(axes, [{name: 100 * value for name, value in row.items()} for row in history], key, key.removeprefix("test/").replace("_", ", "), colour)
    summary = read_summary(run_dir) if (run_dir / "summary.json").exists() else None
    accuracy: dict[str, Any] = summary["rounds"][-1]["accuracy"] if summary and summary["rounds"] else {}
    for key, (words, colour) in LINES.items():
        if accuracy.get(key) is not None:
            label = "ensemble, disclosed counts" if key == "ensemble_estimated" and summary and discloses_counts(summary) else words
            axes.axhline(100 * accuracy[key], label=label, color=colour, linestyle="--", linewidth=1)
    axes.set(xlabel="epoch", ylabel="accuracy on the global test set (%)", ylim=(0, 100))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, run_dir / "accuracy.png")


def _losses(run_dir: Path, history: list[dict[str, float]]) -> Path:
    """The method's terms in one panel per prefix ("student/", "generator/", "watch/")."""
    names = [key for key in dict.fromkeys(key for row in history for key in row) if key not in ("epoch", "seconds") and not key.startswith(("test/", "steps/"))]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    figure = _figure(4.0 * max(len(groups), 1), 3.5)
    for axes, (group, keys) in zip(figure.subplots(1, max(len(groups), 1), squeeze=False)[0], groups.items(), strict=False):
        for key in keys:
            _plot(axes, history, key, key.rpartition("/")[2].replace("_", " "))
        axes.set(xlabel="epoch", title=group or "terms")
        axes.legend(fontsize="small")
    return _save(figure, run_dir / "losses.png")


def _synthetic(run_dir: Path, student: FusedStudent, data: ImageData | None) -> Path:
    """A grid of synthetic images, each with the class and the probability that the merged student gives it."""
    pixels = load_tensors(run_dir / SYNTHETIC_FILE)["pixels"].float() / 255
    with torch.no_grad():
        sure, classes = student(pixels).exp().max(-1)
    names = _names(data, student.image.num_classes)
    figure = _figure(8.0, 9.0)
    side = math.isqrt(len(pixels))
    for index, axes in enumerate(figure.subplots(side, side).flat):
        _show(axes, pixels[index])
        axes.set_title(f"{names[int(classes[index])][:10]} {100 * float(sure[index]):.0f}", fontsize=6, pad=1)
    figure.suptitle("synthetic images: the student's class and its probability (%)", fontsize=9)
    return _save(figure, run_dir / "synthetic.png")


def _show(axes: Axes, pixels: Tensor) -> None:
    picture = pixels.permute(1, 2, 0).numpy()
    axes.imshow(picture if picture.shape[2] == 3 else picture[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def _names(data: ImageData | None, num_classes: int) -> list[str]:
    return [str(index) for index in range(num_classes)] if data is None else [str(name) for name in data.class_names]


def _labels(run_dir: Path, config: RunConfig, data: ImageData) -> Path | None:
    """Training samples per client and class, as stacked bars."""
    counts = Harness(config, data).label_counts
    if counts is None:
        return None
    from matplotlib import colormaps

    clients, classes = counts.shape
    figure = _figure(8.0, 1.5 + 0.35 * min(clients, 20))
    axes = figure.subplots()
    start = np.zeros(clients)
    names = _names(data, classes)
    for index in range(classes):
        colour = colormaps["tab10"](index) if classes <= 10 else colormaps["nipy_spectral"](0.05 + 0.9 * index / (classes - 1))
        axes.barh(np.arange(clients), counts[:, index], left=start, color=colour, label=names[index] if classes <= MAX_NAMES else None)
        start += counts[:, index]
    axes.set(xlabel="training samples", ylabel="client", yticks=np.arange(clients) if clients <= 20 else [])
    axes.invert_yaxis()
    if classes <= MAX_NAMES:
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 if classes <= 12 else 2)
    return _save(figure, run_dir / "labels.png")


def _confusion(run_dir: Path, student: FusedStudent, data: ImageData) -> Path:
    """Rows are true classes, in % of the class."""
    image, labels = data.image, data.y_test
    pixels = data.x_test
    with torch.no_grad():
        predicted = torch.cat([student(chunk.float() / 255).argmax(-1) for chunk in pixels.split(500)])
    counts = confusion_matrix(predicted, labels, image.num_classes).double()
    rates = (100 * counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    few = image.num_classes <= MAX_NAMES
    figure = _figure(6.5, 6.0)
    axes = figure.subplots()
    figure.colorbar(axes.imshow(rates, cmap="Blues", vmin=0, vmax=100), ax=axes, shrink=0.8)
    if few:
        names = [name[:12] for name in _names(data, image.num_classes)]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        for row, column in zip(*np.nonzero(rates >= 0.5), strict=True):
            axes.text(column, row, f"{rates[row, column]:.0f}", ha="center", va="center", fontsize=6, color="white" if rates[row, column] > 60 else "black")
    axes.set(xlabel="predicted", ylabel="true", title="merged student on the global test set (% of the true class)")
    return _save(figure, run_dir / "confusion.png")
