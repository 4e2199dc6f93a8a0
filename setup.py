"""Builds the C++ extension ``moe_kernels._C``; everything that is static stands in pyproject.toml.

Environment:
    MOE_KERNELS_REQUIRE_EXT=1   a failing build is an error. By default it leaves the package without its C++
                                kernels (it then runs on the reference) and says so in one line.
    MAX_JOBS                    how many files are compiled at once.
    CXX, CFLAGS                 the compiler, and what to add to its flags. -march=native is never set here:
                                the kernels choose their instruction set at run time.
"""

import os
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
# Kernels use the LibTorch stable ABI of this release, so that one build serves every torch from it on.
OLDEST_TORCH = (2, 10)
TORCH_TARGET = "{}.{}".format(*OLDEST_TORCH)

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
    """Builds with ninja; a failure leaves a pure Python package unless MOE_KERNELS_REQUIRE_EXT=1."""

    def run(self) -> None:
        try:
            super().run()
        # Whatever a compiler, ninja or torch's own checks raise: the package works without the extension.
        except Exception as error:
            if os.environ.get("MOE_KERNELS_REQUIRE_EXT") == "1":
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            for extension in self.extensions:
                # A library that an earlier build left behind must not be packaged as if it were this one.
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []
            print(
                f"moe-kernels: no C++ kernels were built ({reason}); operators will run on the reference. "
                "Set MOE_KERNELS_REQUIRE_EXT=1 to make this an error.",
                file=sys.stderr,
            )


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


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
            f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
            f'-DMOE_KERNELS_TORCH_TARGET="{TORCH_TARGET}"',
            f'-DMOE_KERNELS_BUILT_TORCH="{torch.__version__}"',
        ]
    },
    language="c++",
)

# `models` and `benchmarks` stand at the top of the repository and are installed inside the package, so that
# no top-level name `models` is taken.
GUESTS = ("models", "benchmarks")

setup(
    packages=[
        *find_packages(include=["moe_kernels", "moe_kernels.*"]),
        *(f"moe_kernels.{name}" for guest in GUESTS for name in find_packages(include=[guest, f"{guest}.*"])),
    ],
    package_dir={f"moe_kernels.{guest}": guest for guest in GUESTS},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildOrDegrade},
)
