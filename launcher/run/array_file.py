"""How a record becomes an .npz file and how a file becomes a record: a field says what its array must be like.

Reading trusts nothing. An array that must be there and does not fit makes the file unusable; one that may be missing
costs only itself. What is small on the disk and would fill the memory is not unpacked.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OverflowError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a file raises that was cut off or overwritten, or never was an .npz file."""

MOST_BYTES = 1 << 29
MOST_RATIO = 200
"""The arrays of a file may take so many bytes, and as many more as its size times this ratio. Of zeros, which counts of
dead experts are, deflate makes a thousandth."""

LETTERS = {
    "layer": "Y",
    "domain": "D",
    "expert": "E",
    "sequence": "N",
    "cluster": "C",
    "token id": "V",
    "probe token": "T",
    "choice": "W",
    "scope": "S",
    "kind": "X",
}
"""Axis -> its letter in names of arrays and in messages."""


class Values(Enum):
    """What an array holds."""

    NAMES = "names"
    COUNTS = "finite numbers of at least 0"
    DOMAINS = "numbers of domains, -1 for none"
    WHOLE = "whole numbers"
    REAL = "real numbers"


@dataclass(frozen=True)
class ArrayField:
    """What is known of one array.

    Attributes:
        axes: keys of `LETTERS`; empty for a single number.
        values: what it holds.
        stored_as: dtype in the file; None: that of its values. In memory, numbers are int64 or float64.
    """

    axes: tuple[str, ...]
    values: Values
    stored_as: str | None

    @property
    def dtype(self) -> type[np.generic]:
        """The dtype in memory of an array that was read."""
        return {Values.NAMES: np.str_, Values.REAL: np.float64}.get(self.values, np.int64)

    def misfit(self, name: str, array: NDArray[Any], sizes: Mapping[str, int]) -> str | None:
        """Returns what is wrong with an array that was read, in one line; None if it fits.

        Args:
            sizes: the sizes of the axes that are known.
        """
        expected = [sizes.get(axis) for axis in self.axes]
        if array.ndim != len(self.axes) or any(
            size not in (None, found) for size, found in zip(expected, array.shape, strict=True)
        ):
            letters = [LETTERS[axis] for axis in self.axes]
            wanted = " x ".join(
                letter if size is None else f"{size} {letter}" for letter, size in zip(letters, expected, strict=True)
            )
            return f"{name} has shape {tuple(array.shape)} instead of {wanted}"
        if array.dtype.kind not in "biuf":
            return f"{name} has values of type {array.dtype} instead of numbers"
        if self.values is Values.COUNTS and not np.all((array >= 0) & np.isfinite(array)):
            return f"{name} has counts that are negative or not finite"
        if self.values in (Values.COUNTS, Values.WHOLE) and not _fits_int64(array):
            return f"{name} has numbers that are not finite, or too large"
        if self.values is Values.DOMAINS and not np.all((array >= -1) & (array < sizes["domain"])):
            return f"{name} has values from {array.min()} to {array.max()} instead of -1 to {sizes['domain'] - 1}"
        return None


def _fits_int64(array: NDArray[Any]) -> bool:
    return np.can_cast(array.dtype, np.int64) or bool(np.all(np.abs(array.astype(np.float64)) < 2.0**63))


def array(*axes: str, values: Values = Values.REAL, stored_as: str | None = None, optional: bool = False) -> Any:
    """Returns the dataclass field of an array, see `ArrayField`.

    Args:
        optional: None if it is not there.
    """
    metadata = {"array": ArrayField(axes, values, stored_as)}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Returns those of the named arrays that a file has, which cannot be written to. No other member is unpacked.

    Raises:
        One of `DAMAGED`; so it does where the arrays would take more memory than `MOST_BYTES` and `MOST_RATIO` allow.
    """
    with zipfile.ZipFile(path) as stored:
        there = {info.filename: info for info in stored.infolist()}
        chosen = {name: info for name in names if (info := there.get(f"{name}.npy")) is not None}
        # What is unpacked of a member ends where its size does, whatever more there is.
        unpacked, packed = sum(info.file_size for info in chosen.values()), path.stat().st_size
        if unpacked > max(MOST_BYTES, MOST_RATIO * packed):
            raise ValueError(
                f"it has {packed:,} bytes, of which {unpacked:,} would come, as of a file that is made to fill the "
                "memory"
            )
        return {name: _array(stored.read(info)) for name, info in chosen.items()}


def _array(content: bytes) -> NDArray[Any]:
    """Returns the array in the content of an .npy file. numpy's own reader evaluates each header, while a report reads
    thousands of arrays of few shapes, and it takes the memory that the header asks for."""
    magic, width = content[: len(_NPY_1)], _LENGTHS.get(content[: len(_NPY_1)])
    if width is None:
        raise ValueError(f"an array begins with {magic!r} instead of {_NPY_1!r}")
    start = len(magic) + width + int.from_bytes(content[len(magic) : len(magic) + width], "little")
    shape, by_column, dtype = _header(content[len(magic) : start], width)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape, order="F" if by_column else "C")


_NPY_1 = b"\x93NUMPY\x01\x00"
_LENGTHS = {_NPY_1: 2, b"\x93NUMPY\x02\x00": 4}
"""How a version of the format begins -> the bytes of the length of its header. The third is for names of fields."""


@lru_cache(maxsize=1024)
def _header(text: bytes, width: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Returns the shape, whether columns come first, and the dtype in a header, which begins with its length.

    Args:
        width: bytes of the length.
    """
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, by_column, dtype = read(io.BytesIO(text))
    except Exception as error:  # it is evaluated like a piece of Python, whose errors are many
        raise ValueError("the header of an array cannot be read") from error
    return shape, by_column, dtype


Record = TypeVar("Record", bound="ArrayFile")


class ArrayFile:
    """Base of the frozen dataclasses that are an .npz file. The first array with an axis decides the axis's size, but
    for the domains, of which there are as many as names."""

    @classmethod
    def fields(cls) -> dict[str, ArrayField]:
        """Returns what is known of each array, by name."""
        return {one.name: one.metadata["array"] for one in fields(cls)}  # type: ignore[arg-type]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays that are there, as they are stored."""
        there = {name: known for name, known in self.fields().items() if getattr(self, name) is not None}
        return {
            name: np.asarray(getattr(self, name), dtype=known.stored_as or (known.dtype if known.axes else None))
            for name, known in there.items()
        }

    def only_layers(self: Record, layers: Sequence[int]) -> Record:
        """Returns the record with these MoE layers alone. Raises ValueError if it lacks one of them."""
        found: dict[str, Any] = {}
        for name, known in self.fields().items():
            values = getattr(self, name)
            if "layer" in known.axes and values is not None:
                axis = known.axes.index("layer")
                if values.shape[axis] <= max(layers):
                    raise ValueError(f"{name} has {values.shape[axis]} MoE layers, and none of number {max(layers)}")
                found[name] = values.take(layers, axis=axis)
        return replace(self, **found)  # type: ignore[type-var]

    def to_bytes(self) -> bytes:
        """Returns the content of the file."""
        content = io.BytesIO()
        np.savez_compressed(content, **self.arrays())  # type: ignore[arg-type]
        return content.getvalue()

    @classmethod
    def read(cls: type[Record], path: Path) -> tuple[Record, list[str]]:
        """Returns the record and, for each array that was left out since it does not fit, a line. Arrays that the
        record does not know are passed over.

        Raises:
            One of `DAMAGED`: the file cannot be read, or an array that must be there is missing or does not fit.
        """
        known = cls.fields()
        required = {one.name for one in fields(cls) if one.default is MISSING}  # type: ignore[arg-type]
        content = load_arrays(path, list(known))
        sizes = {"domain": len(content["domains"])} if "domains" in content else {}
        values: dict[str, Any] = {}
        left_out = []
        for name, form in known.items():
            if name not in content and name not in required:
                continue
            found = content[name]
            if form.values is Values.NAMES:
                values[name] = tuple(map(str, found))
            elif not form.axes:
                values[name] = int(found)
            elif (problem := form.misfit(name, found, sizes)) is None:
                sizes.update(zip(form.axes, found.shape, strict=True))
                values[name] = found.astype(form.dtype)
            elif name in required:
                raise ValueError(problem)
            else:
                left_out.append(problem)
        return cls(**values), left_out
