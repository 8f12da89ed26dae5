"""Numpy's files are believed no size."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fewstep.data.npy import from_npy, from_npz


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    assert np.array_equal(from_npy(npy(array), (2, 3)), array)
    np.savez(tmp_path / "x.npz", a=array)
    assert np.array_equal(from_npz(tmp_path / "x.npz", {"a": (2, 3)})["a"], array)


def test_another_array_is_refused_before_its_memory_is_taken() -> None:
    array = np.ones((2, 3), np.float16)
    whole = npy(array)
    huge = whole.replace(b"(2, 3), }", b"(2, 9999999999999), }"[:9] + b" ")
    for data in (
        whole[:-1],
        whole + b"x",
        huge,
        b"",
        b"\x93NUMPY",
        npy(array.astype(np.float32)),
        npy(array.T),
        whole[:60],
    ):
        with pytest.raises(ValueError):
            from_npy(data, (2, 3))


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(10**7))
    with pytest.raises(ValueError, match="is not of shape"):
        from_npz(tmp_path / "x.npz", {"a": (2, 3)})
    (tmp_path / "x.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"no \.npz"):
        from_npz(tmp_path / "x.npz", {"a": (2, 3)})
