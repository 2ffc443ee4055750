# SPDX-License-Identifier: BSD-3-Clause
"""Arrays that lie about their memory, for readers of DLPack."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


class Forged:
    """An array whose __dlpack__ gives the sizes, strides and dtype that one asks for, of eight zeros."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, **fields: int) -> None:
        self.memory = (ctypes.c_float * 8)()
        self.shape = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        self.strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        given = {"data": ctypes.addressof(self.memory), "ndim": len(shape), "code": 2, "bits": 32, "lanes": 1, **fields}
        self.tensor = DLTensor(device_type=1, shape=self.shape, strides=self.strides, **given)

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    @staticmethod
    def __array_namespace__() -> Any:
        return torch.utils.dlpack
