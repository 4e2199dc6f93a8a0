"""Builds the extensions ``moe_kernels._C`` (C++) and, where nvcc and a torch for CUDA are, ``moe_kernels._C_cuda``.

Everything that is static stands in pyproject.toml. Environment:
    MOE_KERNELS_REQUIRE_EXT=1   a failing C++ build is an error. By default it leaves the package without its C++
                                kernels (it then runs on the reference) and says so in one line.
    MOE_KERNELS_CUDA            0: no CUDA kernels. 1 (or FORCE_CUDA=1): a build without them is an error. By
                                default they are built where they can be, with or without a GPU.
    CUDA_HOME                   the CUDA toolkit; by default that of the nvcc on the path.
    TORCH_CUDA_ARCH_LIST        what the CUDA kernels are built for, as in "8.0;9.0+PTX", which is the default where
                                no GPU is; else those that are here.
    MAX_JOBS                    how many files are compiled at once.
    CXX, CFLAGS                 the compiler, and what to add to its flags. -march=native is never set here:
                                the kernels choose their instruction set at run time.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
# Kernels use the LibTorch stable ABI of this release, so that one build serves every torch from it on.
OLDEST_TORCH = (2, 10)
TORCH_TARGET = "{}.{}".format(*OLDEST_TORCH)


def find_cuda_home() -> str | None:
    """The CUDA toolkit. The nvcc on the path may be a wrapper or a link from elsewhere, which misleads torch."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return named
    compiler = shutil.which("nvcc")
    guesses = [Path(compiler).resolve().parents[1]] if compiler else []
    for guess in (*guesses, Path("/usr/local/cuda")):
        if (guess / "include/cuda_runtime.h").exists() and (guess / "bin/nvcc").exists():
            return str(guess)
    return None


if cuda_home := find_cuda_home():
    os.environ["CUDA_HOME"] = cuda_home  # which torch reads at its import

# With build isolation pip sees to both of these; without it, an environment's own setuptools is often too old.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"moe-kernels: building needs setuptools >= 77, got {setuptools.__version__}. "
        "Run: pip install --upgrade setuptools"
    )
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ModuleNotFoundError as error:
    raise SystemExit(
        f"moe-kernels: building needs torch >= {TORCH_TARGET}, and there is no module {error.name!r} here. "
        "Install torch first, or let pip isolate the build (drop --no-build-isolation)."
    ) from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    raise SystemExit(f"moe-kernels: building needs torch >= {TORCH_TARGET}, got torch {torch.__version__}.")


class BuildOrDegrade(BuildExtension):
    """Builds each extension with ninja; one that fails is left out, unless the environment insists on it."""

    def run(self) -> None:
        wanted, built, compiler = self.extensions, [], self.compiler
        for extension in wanted:
            self.extensions, self.compiler = [extension], compiler  # a run makes an object of the compiler's name
            try:
                if extension is cuda_extension and cuda_problem:
                    raise RuntimeError(cuda_problem)
                super().run()
                built.append(extension)
            # Whatever a compiler, ninja or torch's own checks raise: the package works without the extension.
            except Exception as error:
                kernels, variable, insisted = (
                    ("CUDA", "MOE_KERNELS_CUDA", cuda_choice == "1")
                    if extension is cuda_extension
                    else ("C++", "MOE_KERNELS_REQUIRE_EXT", os.environ.get("MOE_KERNELS_REQUIRE_EXT") == "1")
                )
                if insisted:
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                # A library that an earlier build left behind must not be packaged as if it were this one.
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                print(
                    f"moe-kernels: no {kernels} kernels were built ({reason}); operators will run on the reference. "
                    f"Set {variable}=1 to make this an error.",
                    file=sys.stderr,
                )
        self.extensions = built


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def find_cuda_problem() -> str:
    """Why CUDA kernels for the torch that is here cannot be built; ``""`` where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if cuda_home is None:
        return "there is no nvcc; put it on the path or set CUDA_HOME"
    try:
        told = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{cuda_home}/bin/nvcc does not run: {error}"
    release = re.search(r"release ([\d.]+)", told)
    if release is None or release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc in {cuda_home} is of CUDA {release[1] if release else 'an unknown version'} and torch of "
            f"{torch.version.cuda}; set CUDA_HOME to a toolkit of the same major version"
        )
    if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?([; ]\d+\.\d[af]?(\+PTX)?)*", cuda_architectures()):
        return f"TORCH_CUDA_ARCH_LIST: expected a list as in 8.0;9.0+PTX, got {cuda_architectures()!r}"
    return ""


def cuda_architectures() -> str:
    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    found = ";".join(f"{major}.{minor}" for major, minor in sorted(here))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or found or "8.0;9.0+PTX"


DEFINITIONS = [
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
    f'-DMOE_KERNELS_TORCH_TARGET="{TORCH_TARGET}"',
    f'-DMOE_KERNELS_BUILT_TORCH="{torch.__version__}"',
]

extension = Extension(
    "moe_kernels._C",
    sources=["csrc/module.cpp", *relative("csrc/cpu/*.cpp")],
    depends=["setup.py", *relative("csrc/**/*.h")],
    include_dirs=[str(ROOT / "csrc"), *include_paths()],
    library_dirs=library_paths(),
    libraries=["torch_cpu"],
    extra_compile_args={
        "cxx": [
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-fopenmp-simd",
            # Neither changes a result: no kernel reads errno or floating-point exception flags, and without
            # these two the compiler may not vectorize calls of the math library or conditional arithmetic.
            "-fno-math-errno",
            "-fno-trapping-math",
            *DEFINITIONS,
        ]
    },
    language="c++",
)
extensions = [extension]

cuda_choice = os.environ.get("MOE_KERNELS_CUDA") or os.environ.get("FORCE_CUDA")
cuda_problem = find_cuda_problem()
cuda_extension = None
if cuda_choice == "1" or (cuda_choice != "0" and not cuda_problem):
    os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures()  # without a GPU torch has no default
    device = None if cuda_problem else "cuda"
    cuda_extension = Extension(
        "moe_kernels._C_cuda",
        sources=["csrc/cuda/module.cpp", *relative("csrc/cuda/*.cu")],
        depends=["setup.py", *relative("csrc/**/*.h")],
        include_dirs=[str(ROOT / "csrc"), *include_paths(device)],
        library_dirs=library_paths(device),
        libraries=["torch_cpu", "torch_cuda", "cudart"],
        extra_compile_args={
            "cxx": ["-O2", "-g0", *DEFINITIONS, f'-DMOE_KERNELS_CUDA_ARCH="{cuda_architectures()}"'],
            # USE_CUDA declares the C function that gives torch's current stream.
            "nvcc": ["-O3", "-DUSE_CUDA", DEFINITIONS[0]],
        },
        language="c++",
    )
    extensions.append(cuda_extension)
elif torch.version.cuda and cuda_choice != "0":
    print(f"moe-kernels: no CUDA kernels will be built: {cuda_problem}.", file=sys.stderr)

# `models` and `benchmarks` stand at the top of the repository and are installed inside the package, so that
# no top-level name `models` is taken.
GUESTS = ("models", "benchmarks")

setup(
    packages=[
        *find_packages(include=["moe_kernels", "moe_kernels.*"]),
        *(f"moe_kernels.{name}" for guest in GUESTS for name in find_packages(include=[guest, f"{guest}.*"])),
    ],
    package_dir={f"moe_kernels.{guest}": guest for guest in GUESTS},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildOrDegrade},
)
