"""The compiled form of the CPU LoRA step: `native.cpp`, built once per machine with the C++ compiler.

It takes seconds and needs no torch headers. Without a compiler, or with
`LORA_EXT_NATIVE=0`, the caller falls back to torch (`vllm_lora_ext/grouped.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger("vllm.vllm_lora")

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-std=c++17")
_BUILD_TIMEOUT_S = 30.0
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURE = (_POINTER, _POINTER, _POINTER, _INT64, _POINTER, _INT64, _POINTER)


def compiler() -> str | None:
    """The C++ compiler: `CXX`, else g++ or clang++ of the path; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels, built at first use; None where they cannot be had, and one line says why."""
    try:
        loaded = _load()
    except (OSError, subprocess.SubprocessError) as error:
        reason = _first_line(error)
        logger.warning("LoRA on the CPU runs without native kernels, slower, in torch: %s", reason)
        return None
    for function in (loaded.add_lora_float32, loaded.add_lora_bfloat16):
        function.argtypes, function.restype = _SIGNATURE, None
    return loaded


def _load() -> ctypes.CDLL:
    """Raises OSError or subprocess.SubprocessError with the reason."""
    if os.environ.get("LORA_EXT_NATIVE") == "0":
        raise OSError("LORA_EXT_NATIVE=0")
    cxx = compiler()
    if cxx is None:
        raise OSError("there is no C++ compiler (install g++)")
    return ctypes.CDLL(str(_built(cxx)))


def _first_line(error: Exception) -> str:
    words = getattr(error, "stderr", None) or str(error)
    return str(words).strip().splitlines()[0] if str(words).strip() else type(error).__name__


def _built(cxx: str) -> Path:
    """Path of the shared object for this source, compiler and processor; compiled if it is not there.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be compiled or stored.
    """
    folder = _cache_folder()
    target = folder / f"lora-{_fingerprint(cxx)}.so"
    if target.exists():
        return target
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [cxx, *_FLAGS, "-o", unfinished, str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
        Path(unfinished).replace(target)  # other processes see all of it or nothing
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return target


def _cache_folder() -> Path:
    """A folder of this user only: what lies there is run."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(root).expanduser() / "vllm-lora"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="vllm-lora-"))


def _fingerprint(cxx: str) -> str:
    """Of everything that the compiled code depends on."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(encoding="utf-8").splitlines() if processor.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), os.uname().machine)
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout
    parts = (_SOURCE.read_text(encoding="utf-8"), " ".join(_FLAGS), features, version)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
