"""One-dimensional .npy files that are written piece by piece."""

import math
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.lib import format as npy

from recallzoo.errors import StoreError

_HEADER_BYTES = 128
"""A header of version 1.0 for any one-dimensional array: numpy pads to a multiple of 64."""


class NpyWriter:
    """Append arrays to one .npy file; its length is put in when the file is closed."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.num_values = path, dtype, 0
        self._file = path.open("wb")
        self._file.write(bytes(_HEADER_BYTES))

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(values.data)
        self.num_values += len(values)

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.seek(0)
            header = npy.header_data_from_array_1_0(np.empty(0, self.dtype))
            header["shape"] = (self.num_values,)
            npy.write_array_header_1_0(self._file, header)
            assert self._file.tell() == _HEADER_BYTES
        finally:
            self._file.close()


def npy_layout(path: Path) -> tuple[np.dtype, int, int]:
    """Type, byte offset of the first value, and number of values of a one-dimensional .npy."""
    try:
        with path.open("rb") as file:
            if npy.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0")
            shape, fortran_order, dtype = npy.read_array_header_1_0(file)
            if len(shape) != 1 or fortran_order or dtype.hasobject:
                raise ValueError(f"shape {shape}, type {dtype}")
            return dtype, file.tell(), math.prod(shape)
    except ValueError as error:
        raise StoreError(
            f"{path} is not the array it should be ({error}): it is damaged. Make it again."
        ) from error
    except OSError as error:
        raise StoreError(f"could not read {path}: {error.strerror or error}.") from error
