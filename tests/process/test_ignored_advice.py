"""A madvise(2) that does nothing and reports success, as that of qemu-user, under which programs of
other machines run: values are right, pages go back, and the dead are noticed.
"""

import shutil
import subprocess

import pytest

from process.harness import cases_of, run_program

#: All but MADV_DONTNEED (4), MADV_WIPEONFORK (18) and MADV_KEEPONFORK (19), as qemu-user 7.2 does.
SOURCE = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <unistd.h>
int madvise(void *address, unsigned long nbytes, int advice)
{
    if (advice == 4 || advice == 18 || advice == 19)
        return (int)syscall(SYS_madvise, address, nbytes, advice);
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        pytest.skip("no C compiler is here")
    folder = tmp_path_factory.mktemp("ignored")
    (folder / "madvise.c").write_text(SOURCE)
    built = folder / "madvise.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", built, folder / "madvise.c"], check=True, timeout=60
    )
    return built


@pytest.mark.parametrize("case", cases_of("ignored_advice"))
def test_ignored_advice(library, case):
    run_program("ignored_advice", case, env={"LD_PRELOAD": str(library)}, fresh=True)
