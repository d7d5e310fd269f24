"""Image sets in ``.npz`` files: plain arrays, or packed ones that the ``imgpack.py`` beside the file decodes."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdfkd_strategy.data.array_cache import cached_arrays, store
from cdfkd_strategy.data.image_data import ImageArrays
from cdfkd_strategy.errors import DataError

_NEEDED = ("x_train", "y_train", "x_test", "y_test")

MOST_UNNAMED = 100_000
"""Classes and domains that get their numbers as names; a file with more has to name them."""


def load_npz(path: Path) -> ImageArrays:
    """Read a ``.npz`` file with ``x_train, y_train, x_test, y_test`` and optionally ``class_names, domain_train, domain_names``.

    Images are uint8 ``[N, H, W]``, ``[N, H, W, channels]`` or ``[N, channels, H, W]``. A file with ``x_train_words`` is
    packed: the ``imgpack.py`` beside it is run to decode it, so use packed files from people you trust. What was read
    is kept decoded in the cache (`array_cache`) and memory-mapped from then on.

    Raises:
        DataError: the file is missing, broken, holds other arrays, or is packed without its decoder.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((info.filename, info.CRC, info.file_size) for info in archive.infolist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}; accepted: a .npz file with {', '.join(_NEEDED)}") from error
    packed = any(name == "x_train_words.npy" for name, _, _ in members)
    decoder = path.with_name("imgpack.py")
    if packed and not decoder.is_file():
        raise DataError(f"{path} holds packed images, but {decoder} is not there; copy the imgpack.py that came with the file beside it")
    code = hashlib.sha256(decoder.read_bytes()).hexdigest() if packed else ""

    def build(folder: Path) -> None:
        store(folder, _arrays(path, _unpack(path, decoder) if packed else _read(path)))

    return cached_arrays(path.stem, f"npz|{members}|{code}", build)


def _read(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; accepted: plain arrays, no pickled objects") from error


def _unpack(path: Path, decoder: Path) -> dict[str, Any]:
    """Run ``load(path)`` of the decoder that lies beside the file."""
    spec = importlib.util.spec_from_file_location("cdfkd_imgpack", decoder)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return dict(module.load(str(path)))
    except Exception as error:  # foreign code on a possibly broken file: whatever it raises, the file did not decode
        raise DataError(f"{decoder} could not decode {path} ({type(error).__name__}: {error}); fetch both files again") from error


def _arrays(path: Path, values: Mapping[str, Any]) -> ImageArrays:
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(values))}; accepted: {', '.join(_NEEDED)} and optionally class_names")
    y_train, y_test = (_labels(path, name, values[name]) for name in ("y_train", "y_test"))
    domains = _labels(path, "domain_train", values["domain_train"]) if "domain_train" in values else None
    names = _names(path, "class_names", values, max(y_train.max(initial=0), y_test.max(initial=0)))
    domain_names = () if domains is None else _names(path, "domain_names", values, domains.max(initial=0))
    try:
        return ImageArrays(
            x_train=_channels_first(np.asarray(values["x_train"])),
            y_train=y_train,
            x_test=_channels_first(np.asarray(values["x_test"])),
            y_test=y_test,
            class_names=names,
            domain_train=domains,
            domain_names=domain_names,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _labels(path: Path, name: str, values: Any) -> NDArray[np.int64]:
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} is {labels.dtype}; accepted: whole numbers from 0")
    if labels.ndim != 1:
        raise DataError(f"{path}: {name} has the shape {labels.shape}; accepted: one number per image, [N]")
    return labels.astype(np.int64)


def _names(path: Path, name: str, values: Mapping[str, Any], highest: np.int64) -> tuple[str, ...]:
    """The names in the file, or the numbers up to the highest one."""
    if name in values:
        return tuple(str(each) for each in np.atleast_1d(values[name]))
    if highest >= MOST_UNNAMED:
        raise DataError(f"{path} has a label {highest} and no {name}; accepted: numbers below {MOST_UNNAMED}, or a name for each")
    return tuple(str(number) for number in range(int(highest) + 1))


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    """``[N, H, W]`` and ``[N, H, W, channels]`` to ``[N, channels, H, W]``."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    return images
