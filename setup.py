"""Builds the extension module `oobpickle._core`, which everything that shares memory needs.

A machine without a C compiler gets one that is a wheel, ``ziglang``. Where nothing can be compiled
the package is built without the module: it imports, and works with everything in-band; its wheel is
tagged as one for any Python. ``OOBPICKLE_BUILD`` says otherwise: with ``require`` the build fails
instead, with ``none`` nothing is compiled. ``OOBPICKLE_TARGET`` names a machine and the oldest
glibc that the module is to run with, as ``aarch64-linux-gnu.2.28``: ``ziglang`` compiles it so.
"""

import os
import shutil
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("OOBPICKLE_BUILD", "")
FOLDER = "src/oobpickle/_core"
TARGET = os.environ.get("OOBPICKLE_TARGET", "")
MACHINE, _, GLIBC = TARGET.partition("-linux-gnu.")
ZIG = f"{sys.executable} -m ziglang cc" + (f" -target {TARGET}" if TARGET else "")

if WANTED not in ("", "none", "require"):
    sys.exit(f"OOBPICKLE_BUILD is {WANTED!r}, expected none, require, or nothing")
if TARGET and not (MACHINE and GLIBC):
    sys.exit(f"OOBPICKLE_TARGET is {TARGET!r}, expected one such as x86_64-linux-gnu.2.28")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(
        "oobpickle: this is a free-threaded Python, and the extension module is not safe without "
        "the global interpreter lock. Use the ordinary build of the same version."
    )


def has_compiler():
    if TARGET:
        return False  # that of this machine is for this machine
    names = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[:1]
    return any(map(shutil.which, [*names, "cc", "gcc", "clang"]))


class BuildCore(build_ext):
    """Builds the module, or goes on without it."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if WANTED == "require":
                raise
            print(f"oobpickle: built without its extension module: {error}", file=sys.stderr)
            self.distribution.ext_modules = self.extensions = []

    def build_extensions(self):
        if not has_compiler():
            self.compiler.set_executables(
                compiler_so=f"{ZIG} -fPIC", compiler=ZIG, linker_so=f"{ZIG} -shared"
            )
        elif not shutil.which(self.compiler.compiler_so[0]):  # not the one of this Python's maker
            found = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
            self.compiler.set_executables(
                compiler_so=f"{found} -fPIC", compiler=found, linker_so=f"{found} -shared"
            )
        super().build_extensions()


class TaggedWheel(bdist_wheel):
    """Tags the wheel for what was built: one with the module for this platform, else for any."""

    def run(self):
        self.run_command("build_ext")
        if not self.distribution.ext_modules:
            self.root_is_pure, self.py_limited_api, self.plat_name_supplied = True, False, False
        super().run()


core = Extension(
    "oobpickle._core",
    sources=sorted(f"{FOLDER}/{name}" for name in os.listdir(FOLDER) if name.endswith(".c")),
    depends=[f"{FOLDER}/core.h", f"{FOLDER}/layout.h"],
    extra_compile_args=["-std=c11", "-O2", "-g0", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
    py_limited_api=True,
)
is_for_any = WANTED == "none" or sys.platform != "linux"
wheel_options = {"py_limited_api": "cp311"}
if TARGET:
    wheel_options["plat_name"] = f"manylinux_{GLIBC.replace('.', '_')}_{MACHINE}"
setup(
    ext_modules=[] if is_for_any else [core],
    cmdclass={"build_ext": BuildCore, "bdist_wheel": TaggedWheel},
    options={} if is_for_any else {"bdist_wheel": wheel_options},
    setup_requires=[] if is_for_any or has_compiler() else ["ziglang"],
)
