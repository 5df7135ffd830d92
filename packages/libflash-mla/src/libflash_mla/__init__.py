"""The FlashMLA C++ library as a wheel: where its files are, for CMake, linkers and ctypes.

    cmake -DCMAKE_PREFIX_PATH="$(python -m libflash_mla)" ...      # find_package(flash_mla)

The Python interface is the package `flash-mla` (`import flash_mla`).
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

__all__ = ["__version__", "cmake_prefix_path", "library_path", "load"]

__version__ = version("libflash-mla")

_PREFIX = Path(__file__).resolve().parent


def cmake_prefix_path() -> str:
    """The folder to put on CMAKE_PREFIX_PATH so that `find_package(flash_mla)` succeeds."""
    return str(_PREFIX)


def library_path() -> str:
    """The path of libflash_mla.so. Raises FileNotFoundError when the installation lacks it."""
    path = _PREFIX / "lib64" / "libflash_mla.so"
    if not path.is_file():
        raise FileNotFoundError(f"libflash-mla is installed without {path}; reinstall libflash-mla")
    return str(path)


def load() -> ctypes.CDLL:
    """Load the library into this process. Its C++ symbols stay local to those who link it."""
    return ctypes.CDLL(library_path())
