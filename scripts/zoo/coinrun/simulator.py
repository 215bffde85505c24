"""CoinRun of the procgen benchmark, called through ctypes: no gym, no cffi, any Python.

The library draws 64x64 RGB frames of many games at once. A game is a function of its seeds and actions: the number of
threads changes no pixel. ``python -m scripts.zoo.coinrun.fetch`` makes the folder that this module loads.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from diffaccel.errors import DiffAccelError
from scripts.zoo.coinrun.stubs import load_in_order

SIZE = 64
ACTIONS = ("left down", "left", "left up", "down", "none", "up", "right down", "right", "right up")
NULL_ACTION = len(ACTIONS)  # of a frame that no known action produced
_COMBINATIONS = 15  # of keys, as the library counts its actions; those after the ninth do nothing in this game
_OBSERVATION, _ACTION, _INFO = 1, 2, 3
_DTYPES = {1: np.uint8, 2: np.int32, 3: np.float32}
_MAX_STATE = 1 << 20
# In a serialised state, counted from its end: an end mark and seven fields of CoinRun, the grid of 64x64 cells and its
# three sizes, then smallest visibility, visibility, y and x of the camera.
_CAMERA = 8 * 4 + (3 + 64 * 64) * 4 + 4 * 4


class _Tensortype(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 128),
        ("scalar_type", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("shape", ctypes.c_int * 16),
        ("ndim", ctypes.c_int),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
    ]


class _Option(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 128),
        ("dtype", ctypes.c_int),
        ("count", ctypes.c_int),
        ("data", ctypes.c_void_p),
    ]


class _Options(ctypes.Structure):
    _fields_ = [("items", ctypes.POINTER(_Option)), ("count", ctypes.c_int)]


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("ob", ctypes.POINTER(ctypes.c_void_p)),
        ("rew", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("info", ctypes.POINTER(ctypes.c_void_p)),
        ("ac", ctypes.POINTER(ctypes.c_void_p)),
    ]


@cache
def _library(folder: Path) -> ctypes.CDLL:
    library = load_in_order(folder / "lib")
    handle, index, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    library.libenv_make.argtypes, library.libenv_make.restype = [ctypes.c_int, _Options], handle
    library.libenv_get_tensortypes.argtypes = [handle, ctypes.c_int, ctypes.POINTER(_Tensortype)]
    library.libenv_set_buffers.argtypes = [handle, ctypes.POINTER(_Buffers)]
    for name in ("libenv_observe", "libenv_act", "libenv_close"):
        getattr(library, name).argtypes = [handle]
    for name in ("get_state", "set_state"):
        getattr(library, name).argtypes = [handle, index, text, ctypes.c_int]
    return library


class CoinRun:
    """``count`` games of easy CoinRun side by side.

    Args:
        folder: made by ``fetch``.
        count: number of games.
        seed: of the choice of levels.
        levels: first level and number of levels; two ranges that do not overlap have no level in common.
        threads: of the library; 0 draws in the calling thread.

    Attributes:
        frames: ``(count, 64, 64, 3)`` uint8, overwritten by every step.
        first: ``(count,)`` whether a frame is the first of its episode; its action belongs to the episode before.
        level: ``(count,)`` number of each game's level.
    """

    def __init__(self, folder: Path, count: int, seed: int, levels: tuple[int, int], threads: int = 0) -> None:
        folder = folder.resolve()
        if not (folder / "lib").is_dir():
            raise DiffAccelError(
                f"There is no CoinRun in '{folder}'. Run python -m scripts.zoo.coinrun.fetch --data {folder} where "
                "there is a network, and take the folder along."
            )
        self.count, self._library, self._keep = count, _library(folder), []
        self._handle = self._make(
            {
                "env_name": "coinrun", "num_levels": levels[1], "start_level": levels[0], "num_actions": _COMBINATIONS,
                "use_sequential_levels": False, "debug_mode": 0, "rand_seed": seed, "num_threads": threads,
                "render_human": False, "resource_root": f"{folder / 'assets'}/", "center_agent": True,
                "use_generated_assets": False, "use_monochrome_assets": False, "restrict_themes": False,
                "use_backgrounds": True, "paint_vel_info": False, "distribution_mode": 0,
            }
        )  # fmt: skip
        observed, observed_at = self._space(_OBSERVATION)
        taken, taken_at = self._space(_ACTION)
        info, info_at = self._space(_INFO)
        self.frames, self._actions, self.level = observed["rgb"], taken["action"], info["level_seed"]
        self._rewards, self.first = np.zeros(count, np.float32), np.zeros(count, np.uint8)
        buffers = _Buffers(observed_at, self._rewards.ctypes.data, self.first.ctypes.data, info_at, taken_at)
        self._keep += [buffers, observed, taken, info]
        self._library.libenv_set_buffers(self._handle, ctypes.byref(buffers))
        self._library.libenv_observe(self._handle)

    def _make(self, options: dict[str, str | int | bool]) -> int:
        items = (_Option * len(options))()
        for item, (name, value) in zip(items, options.items(), strict=True):
            data: ctypes.Array | ctypes._SimpleCData
            if isinstance(value, str):
                data, item.dtype, item.count = ctypes.create_string_buffer(value.encode()), 1, len(value.encode())
            elif isinstance(value, bool):
                data, item.dtype, item.count = ctypes.c_uint8(value), 1, 1
            else:
                data, item.dtype, item.count = ctypes.c_int32(value), 2, 1
            item.name, item.data = name.encode(), ctypes.addressof(data)
            self._keep.append(data)
        self._keep.append(items)
        return self._library.libenv_make(self.count, _Options(items, len(options)))

    def _space(self, which: int) -> tuple[dict[str, np.ndarray], ctypes.Array]:
        """Return the arrays of a space by name, and the pointers to each game's part of them."""
        number = self._library.libenv_get_tensortypes(self._handle, which, None)
        types = (_Tensortype * number)()
        self._library.libenv_get_tensortypes(self._handle, which, types)
        arrays, pointers = {}, (ctypes.c_void_p * (number * self.count))()
        for row, kind in enumerate(types):
            array = np.zeros((self.count, *kind.shape[: kind.ndim]), _DTYPES[kind.dtype])
            for game in range(self.count):
                pointers[row * self.count + game] = array.ctypes.data + game * array.strides[0]
            arrays[kind.name.decode()] = array
        self._keep.append(pointers)
        return arrays, pointers

    def step(self, actions: np.ndarray) -> None:
        """Take one action ``(count,)`` in every game, numbers of ``ACTIONS``, and draw the frames that they produce."""
        self._actions[:] = actions
        self._library.libenv_act(self._handle)
        self._library.libenv_observe(self._handle)

    def states(self) -> list[bytes]:
        """Return the whole state of every game, from which :meth:`restore` goes on."""
        buffer = ctypes.create_string_buffer(_MAX_STATE)
        sizes = (self._library.get_state(self._handle, game, buffer, _MAX_STATE) for game in range(self.count))
        return [buffer.raw[:size] for size in sizes]

    def restore(self, states: Sequence[bytes]) -> None:
        """Put every game into a state, and draw its frame."""
        for game, state in enumerate(states):
            self._library.set_state(self._handle, game, state, len(state))
        self._library.libenv_observe(self._handle)

    def close(self) -> None:
        """End all games."""
        if self._handle:
            self._library.libenv_close(self._handle)
            self._handle = 0


def camera(state: bytes) -> tuple[float, float]:
    """Return x and y of a state's camera in pixels: what stands still moves by ``(-dx, +dy)`` on the screen."""
    x, y = struct.unpack_from("<ff", state, len(state) - _CAMERA)
    return x, y
