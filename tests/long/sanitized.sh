#!/usr/bin/env bash
# sanitized.sh [ARGUMENTS OF PYTEST]: build the extension module with AddressSanitizer and UBSan, and run
# the unit tests with it; without arguments, all of them but those that fork for their own ends. Leaks of
# the interpreter itself are not counted.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/src" "$work/src"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
cc -std=c11 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined \
  -fPIC -shared -pthread -I"$include" "$root"/src/oobpickle/_core/*.c \
  -o "$work/src/oobpickle/_core.abi3.so"
cd "$root"
[[ $# -gt 0 ]] || set -- tests/unit tests/property/test_table_machine.py
LD_PRELOAD="$(cc -print-file-name=libasan.so) $(cc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 PYTHONMALLOC=malloc PYTHONPATH="$work/src" \
  "$python" -m pytest "$@"
