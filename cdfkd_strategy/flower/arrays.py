"""Weights in messages: state dict <-> `ArrayRecord`, without pickle, and without trusting a byte of what came."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from cdfkd_strategy.errors import UploadError

NUMPY_FORMAT = "numpy.ndarray"
"""The only serialisation of arrays that is read: NumPy's .npy, whose header is checked before its data is touched."""

_HEADER_BYTES = 12_000
"""More than any .npy header of a plain array; NumPy itself refuses headers above 10,000 characters."""


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """A state dict as an `ArrayRecord`; the tensors are copied."""
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in state.items()})


def from_record(record: ArrayRecord, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict in a record that came over the network.

    Args:
        record: what came.
        reference: the state dict of the network that it must fit; its values are not looked at, only its shapes and dtypes.

    Returns:
        New tensors on the CPU, in the order of ``reference``.

    Raises:
        UploadError: names, shapes or dtypes are not the reference's; bytes are malformed; a value is not finite; a
            BatchNorm variance is negative.
    """
    missing = [name for name in reference if name not in record]
    unexpected = [name for name in record if name not in reference]
    if missing or unexpected:
        raise UploadError(
            f"the arrays are not this architecture's: {_some(missing) or 'none'} missing, {_some(unexpected) or 'none'} unexpected; "
            f"accepted: exactly its {len(reference)} entries"
        )
    return {name: _checked(name, _decode(name, record[name], like), like) for name, like in reference.items()}


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(str(name)[:60]) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _decode(name: str, array: Array, like: Tensor) -> np.ndarray:
    """Read one .npy block; shape, dtype and length are compared with what is expected before memory is taken."""
    if array.stype != NUMPY_FORMAT:
        raise UploadError(f"array {name!r} is serialised as {str(array.stype)[:60]!r}; accepted: {NUMPY_FORMAT!r}")
    expected = torch.empty(0, dtype=like.dtype).numpy().dtype
    size = like.numel() * expected.itemsize
    if not isinstance(array.data, bytes) or not size <= len(array.data) <= size + _HEADER_BYTES:
        raise UploadError(f"array {name!r} has {len(array.data)} bytes; accepted: {size} and a header, the size of {tuple(like.shape)} {expected}")
    stream = io.BytesIO(array.data)
    try:
        shape, fortran, dtype = _read_header(stream)
    except Exception as error:  # the header is hostile text: whatever its parser raises, the answer is the same
        raise UploadError(f"array {name!r} is malformed ({type(error).__name__}); accepted: NumPy's .npy format, versions 1.0 and 2.0") from error
    if shape != tuple(like.shape):
        raise UploadError(f"array {name!r} has the shape {shape}; accepted: {tuple(like.shape)}")
    if dtype != expected:
        raise UploadError(f"array {name!r} is {dtype}; accepted: {expected}")
    if len(array.data) - stream.tell() != size:
        raise UploadError(f"array {name!r} holds {len(array.data) - stream.tell()} bytes of data; accepted: {size}")
    values = np.frombuffer(array.data, dtype=expected, count=math.prod(shape), offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _read_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version}")


def _checked(name: str, values: np.ndarray, like: Tensor) -> Tensor:
    tensor = torch.from_numpy(np.array(values, order="C")).reshape(like.shape)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        broken = int((~torch.isfinite(tensor)).sum())
        raise UploadError(f"array {name!r} holds {broken} NaN or infinite values of {tensor.numel()}; the training diverged: lower its learning rate")
    if name.rpartition(".")[2] == "running_var" and not bool((tensor >= 0).all()):
        raise UploadError(f"array {name!r} is a BatchNorm variance with a smallest value of {tensor.min().item():.3g}; accepted: from 0")
    return tensor
