"""A small copy of procgen's shared library and the libraries that it needs, without what is never called.

The wheel brings Qt and, behind it, text shaping, character tables, OpenGL and the system journal: 40 MB that drawing
sprites never calls. The copy keeps Qt, libpng and the game; every other library is replaced by an empty one of another
name, so that nothing else in the process meets it. A function of them that is called after all says its name and ends
the process.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

from diffaccel.errors import DiffAccelError

KEPT = ("libpng15", "libQt5Core", "libQt5Gui")  # in the order in which they are loaded; then the game
GAME = "libenv.so"
_SYSTEM = (
    "libpthread.so.0", "libdl.so.2", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libz.so.1",
    "ld-linux-x86-64.so.2",
)  # fmt: skip
_PREFIX, _STUB = b"lib", b"nil"
# Asked for by Qt when it starts: the name of the locale's encoding.
_ANSWERED = {
    "ucnv_getDefaultName_50": 'const char *ucnv_getDefaultName_50(void) { return "UTF-8"; }',
    "ucnv_getStandardName_50": "void *ucnv_getStandardName_50(void) { return 0; }",
}
_CALLED = 'void {0}(void) {{ fprintf(stderr, "{0} is missing from this copy of procgen\\n"); abort(); }}'


def copy_libraries(wheel: Path, target: Path) -> None:
    """Copy what is kept of an unpacked wheel to ``target``, stripped, beside empty libraries for the rest.

    Raises:
        DiffAccelError: where gcc or binutils are missing.
    """
    if missing := [tool for tool in ("gcc", "strip", "nm", "readelf") if shutil.which(tool) is None]:
        raise DiffAccelError(f"Making the copy needs {', '.join(missing)}: install gcc and binutils.")
    target.mkdir(parents=True)
    bundled = sorted((wheel / "procgen_mirror.libs").iterdir())
    kept = [file for file in bundled if file.name.startswith(KEPT)]
    kept.append(wheel / "procgen" / "data" / "prebuilt" / GAME)
    copies = [Path(shutil.copy(file, target)) for file in kept]
    for file in copies:
        _output("strip", "--strip-unneeded", file)
    needed = {name for file in copies for name in _needed(file)}
    absent = sorted(needed - set(_SYSTEM) - {file.name for file in copies})
    symbols = _missing_symbols(copies)
    for file in copies:
        data = file.read_bytes()
        for name in absent:
            data = data.replace(name.encode() + b"\0", name.encode().replace(_PREFIX, _STUB, 1) + b"\0")
        file.write_bytes(data)
    for name in absent:  # all functions in each: a library looks for them in those that it names, not in the process
        _write_stub(target / name.replace("lib", "nil", 1), symbols)
    for file in target.iterdir():
        file.chmod(0o644)


def load_in_order(folder: Path) -> ctypes.CDLL:
    """Load the copy's libraries, each after those that it needs, and return the game's."""
    try:
        for name in ("libz.so.1", *sorted(folder.glob("nil*")), *(_one(folder, prefix) for prefix in KEPT)):
            ctypes.CDLL(str(name))
        return ctypes.CDLL(str(folder / GAME))
    except OSError as error:
        raise DiffAccelError(f"CoinRun's library cannot be loaded from '{folder}': {error}.") from error


def _one(folder: Path, prefix: str) -> Path:
    return next(iter(sorted(folder.glob(f"{prefix}*"))), folder / prefix)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _needed(file: Path) -> list[str]:
    lines = _output("readelf", "-d", file).splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]


def _symbols(file: Path, which: str) -> set[str]:
    """Return the names of a library's dynamic symbols, "--undefined-only" without the weak ones or "--defined-only"."""
    fields = [line.split() for line in _output("nm", "-D", which, file).splitlines()]
    return {field[-1].split("@")[0] for field in fields if field[-2] != "w"}


def _missing_symbols(files: list[Path]) -> list[str]:
    """Return what the files call and neither they nor the system have."""
    defined = set().union(*(_symbols(file, "--defined-only") for file in files))
    for name in _SYSTEM:
        places = (Path(root) / name for root in ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/usr/lib"))
        if (file := next((place for place in places if place.exists()), None)) is not None:
            defined |= _symbols(file, "--defined-only")
    return sorted(set().union(*(_symbols(file, "--undefined-only") for file in files)) - defined)


def _write_stub(file: Path, symbols: list[str]) -> None:
    source = file.with_suffix(".c")
    functions = [_ANSWERED.get(symbol) or _CALLED.format(symbol) for symbol in symbols]
    source.write_text("\n".join(["#include <stdio.h>", "#include <stdlib.h>", *functions]) + "\n", encoding="utf-8")
    flags = ("-shared", "-fPIC", "-Os", "-s", "-w", "-fno-builtin", f"-Wl,-soname,{file.name}")
    _output("gcc", *flags, "-o", file, source)
    source.unlink()
