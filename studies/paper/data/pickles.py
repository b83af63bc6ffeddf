"""Arrays out of pickles that nobody vouches for: what makes arrays is known, and nothing else."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from assets import DemoError

# Pickles of every numpy say numpy.core; from numpy 2 on that module is numpy._core.
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "numpy" and global_name in ("ndarray", "dtype"):
            return getattr(np, global_name)
        if module_name in MULTIARRAY and global_name == "_reconstruct":
            return _reconstruct
        if (module_name, global_name) == ("numpy._core.numeric", "_frombuffer"):
            return _from_buffer
        if (module_name, global_name) == ("_codecs", "encode"):
            return _encode
        raise DemoError(f"the pickle asks for {module_name}.{global_name}, which no array needs")


def load_array(contents: bytes) -> np.ndarray:
    """The array in a pickle.

    Raises:
        DemoError: It asks for anything else than numpy's arrays, or is none.
    """
    try:
        found = _ArraysOnly(io.BytesIO(contents)).load()
    except DemoError:
        raise
    except Exception as error:  # a broken pickle raises whatever it comes to
        raise DemoError(f"not a pickled array: {type(error).__name__}: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.hasobject:
        raise DemoError(f"expected a pickled array of numbers, got a {type(found).__name__}")
    return found


def _reconstruct(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray:
    if kind is not np.ndarray:
        raise DemoError(f"the pickle makes a {kind}")
    return np.ndarray.__new__(np.ndarray, shape, typecode)  # type: ignore[arg-type]


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DemoError(f"the pickle encodes in {encoding!r}")
    return text.encode("latin1")
