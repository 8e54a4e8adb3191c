"""Builds the extension in ``csrc`` on the LibTorch stable ABI; everything else about the package is in pyproject.toml.

One shared library, ``vmamba/_C.so``, holds the kernels. It has no Python symbols and no torch C++ ones, so one build
serves every Python >= 3.10 and every torch >= 2.10. CUDA kernels are built where nvcc and a CUDA build of torch are
present. Environment variables:

    VMAMBA_NO_CUDA=1        leave the CUDA kernels out
    VMAMBA_FORCE_CUDA=1     fail rather than leave them out
    TORCH_CUDA_ARCH_LIST    CUDA architectures, as for any torch extension
    MAX_JOBS                compilers to run at once
"""

import os
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(*patterns: str) -> list[str]:
    """Paths of the sources that match, relative to the project as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def with_cuda() -> bool:
    """Whether to build the CUDA kernels; says aloud why not."""
    if os.environ.get("VMAMBA_NO_CUDA") == "1":
        missing = "VMAMBA_NO_CUDA=1 is set"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        missing = "nvcc was not found (set CUDA_HOME)"
    elif torch.version.cuda is None:
        missing = "this torch is a CPU build"
    elif not sources("csrc/cuda/*.cu"):
        missing = "this source tree has no CUDA kernels"
    else:
        return True
    if os.environ.get("VMAMBA_FORCE_CUDA") == "1":
        raise SystemExit(f"VMAMBA_FORCE_CUDA=1, but {missing}")
    print(f"vmamba: building for the CPU only: {missing}")
    return False


def extension() -> Extension:
    """The one shared library."""
    cpp = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    if not with_cuda():
        return CppExtension("vmamba._C", cpp, extra_compile_args={"cxx": CXX_FLAGS + STABLE_ABI})
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    return CUDAExtension(
        "vmamba._C",
        cpp + sources("csrc/cuda/*.cu"),
        define_macros=[("VMAMBA_WITH_CUDA", None)],
        extra_compile_args={"cxx": CXX_FLAGS + STABLE_ABI + ["-DUSE_CUDA"], "nvcc": CUDA_FLAGS + STABLE_ABI},
    )


class BuildStableExtension(BuildExtension):
    """Builds a plain shared library: no Python module, no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext) -> list[str]:
        return []

    def get_libraries(self, ext) -> list[str]:
        """Only what holds the stable ABI's C functions: not libc10, not libtorch_python."""
        return [library for library in ext.libraries if library in ("torch_cpu", "torch_cuda", "cudart")]


class StableWheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildStableExtension, "bdist_wheel": StableWheel})
