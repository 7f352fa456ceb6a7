#!/usr/bin/env bash
# sanitized.sh [address|thread] [ARGUMENTS OF PYTEST]: build the extension module with AddressSanitizer
# and UBSan, or with ThreadSanitizer, and run the unit tests with it; without arguments, all of them but
# those that fork for their own ends. Leaks of the interpreter itself are not counted. ThreadSanitizer sees
# the threads of one process only, and no fences (they are compiled, and not checked): the order between
# processes is in docs/explanation/core.md.
set -euo pipefail

kind=address
case ${1:-} in address | thread) kind=$1; shift ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/src" "$work/src"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
if [[ $kind == address ]]; then
  flags=(-fsanitize=address,undefined -fno-sanitize-recover=undefined)
  preloaded="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)"
  [[ $# -gt 0 ]] || set -- tests/unit tests/property/test_table_machine.py
else
  flags=(-fsanitize=thread -Wno-tsan)
  preloaded=$(cc -print-file-name=libtsan.so)
  # polars cannot be imported; and vfork is a fork, so who starts a program has had a child that joined.
  [[ $# -gt 0 ]] || set -- -n 0 tests/unit tests/property/test_table_machine.py \
    --ignore=tests/unit/test_ecosystem.py --ignore=tests/unit/explain/test_walking.py \
    --ignore=tests/unit/cli/test_arenas.py
fi
cc -std=c11 -O1 -g -fno-omit-frame-pointer "${flags[@]}" -fPIC -shared -pthread -I"$include" \
  "$root"/src/oobpickle/_core/*.c -o "$work/src/oobpickle/_core.abi3.so"
cd "$root"
# ThreadSanitizer's shadow has no room for an address space that is arranged at random (setarch -R).
LD_PRELOAD=$preloaded ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1:handle_segv=0 \
  TSAN_OPTIONS=die_after_fork=0:allocator_may_return_null=1:handle_segv=0:exitcode=66 \
  PYTHONMALLOC=malloc PYTHONPATH="$work/src" setarch -R "$python" -m pytest "$@"
