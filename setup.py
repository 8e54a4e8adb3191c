"""Builds the extension in ``csrc`` on the LibTorch stable ABI; everything else about the package is in pyproject.toml.

One shared library, ``vmamba/_C.so``, holds the kernels. It has no Python symbols and no torch C++ ones, so one build
serves every Python >= 3.10 and every torch >= 2.10. CUDA kernels are built where nvcc and a CUDA build of torch are
present, and a GPU to run them: for that GPU's architecture. Environment variables change this:

    TORCH_CUDA_ARCH_LIST    build for these architectures, GPU or not, as for any torch extension
    VMAMBA_FORCE_CUDA=1     build for all architectures in DEFAULT_CUDA_ARCHITECTURES, and fail if that cannot be done
    VMAMBA_NO_CUDA=1        leave the CUDA kernels out
    MAX_JOBS                compilers to run at once
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
DEFAULT_CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def sources(*patterns: str) -> list[str]:
    """Paths of the sources that match, relative to the project as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def with_cuda() -> bool:
    """Whether to build the CUDA kernels; says aloud why not."""
    forced = os.environ.get("VMAMBA_FORCE_CUDA") == "1"
    if os.environ.get("VMAMBA_NO_CUDA") == "1":
        missing = "VMAMBA_NO_CUDA=1 is set"
    elif CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        missing = "nvcc was not found (set CUDA_HOME)"
    elif torch.version.cuda is None:
        missing = "this torch is a CPU build"
    elif not (forced or os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()):
        missing = "there is no GPU here (name architectures in TORCH_CUDA_ARCH_LIST to build for another machine)"
    else:
        return True
    if forced:
        raise SystemExit(f"VMAMBA_FORCE_CUDA=1, but {missing}")
    print(f"vmamba: building for the CPU only: {missing}", file=sys.stderr)
    return False


def extension() -> Extension:
    """The one shared library."""
    cpp = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    if not with_cuda():
        return CppExtension("vmamba._C", cpp, extra_compile_args={"cxx": CXX_FLAGS + STABLE_ABI})
    if os.environ.get("VMAMBA_FORCE_CUDA") == "1":
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
        """Only what holds the stable ABI's C functions: not libc10, not libtorch_python.

        The CUDA runtime comes with libtorch_cuda, which is linked to it: ours is then always torch's own.
        """
        return [library for library in ext.libraries if library in ("torch_cpu", "torch_cuda")]


class BuildPackage(build_py):
    """Puts the bundled configurations into the package; a checkout uses them where they lie."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "configs", Path(self.build_lib, "vmamba", "configs"), dirs_exist_ok=True)


class StableWheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildStableExtension, "build_py": BuildPackage, "bdist_wheel": StableWheel},
)
