"""NVIDIA's compiler of CUDA C, which needs no GPU and no driver: package nvidia-cuda-nvrtc-cu12."""

import ctypes
import importlib.util
from pathlib import Path


def path():
    """Of the library; None where the package is not installed."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ImportError:
        return None
    folders = [Path(place) / "lib" for place in (spec.submodule_search_locations if spec else [])]
    return next((p for folder in folders for p in sorted(folder.glob("libnvrtc.so*"))), None)


def compile_source(source, *options):
    """(did it compile, what the compiler said, PTX). For sm_.. down to the machine's code."""
    nvrtc, program = ctypes.CDLL(str(path())), ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    assert made == 0
    texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    error = nvrtc.nvrtcCompileProgram(program, len(options), texts)

    def said(what):
        size = ctypes.c_size_t()
        assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{what}")(program, text) == 0
        return text.value.decode()

    log = said("ProgramLog")
    return error == 0, log, "" if error else said("PTX")
