#!/bin/sh
# How much of the library and of main.cpp the core tests run: 97 % of the lines and 90 % of the branches, or it fails.
# Usage: tests/coverage.sh [BUILDDIR]; it builds in BUILDDIR/coverage with g++, or in a temporary folder. What the core
# tests leave out, and why, is in coverage.md. CORE_OBJECTS may be a folder of the core tests' objects. Without gcovr it is skipped (77), or fails when NO_SKIP=1.
set -eu
cd "$(dirname "$0")/.."
if ! command -v gcovr >/dev/null || ! command -v g++ >/dev/null; then
    echo "skipped: there is no gcovr, or no g++"
    [ "${NO_SKIP:-}" = 1 ] && exit 1
    exit 77
fi
umask 0   # the program becomes nobody, and is to add its counts to the files all the same
if [ -n "${1:-}" ]; then
    mkdir -p "$1/coverage" && work=$(cd "$1/coverage" && pwd)
    rm -f "$work"/*
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
fi
chmod 777 "$work"

objects=$(find "${CORE_OBJECTS:-/nonexistent}" -name '*.o' 2>/dev/null || true)
for source in asyncore.cpp smtpd.cpp main.cpp $([ -n "$objects" ] || sh tests/dist/core_sources.sh); do
    counted=--coverage
    [ "${source#tests/}" = "$source" ] || counted=
    echo "g++ -std=c++17 -O0 $counted -I. -c -o $work/$(basename "$source" .cpp).o $source"
done | xargs -P 2 -I{} sh -c '{}'
g++ --coverage -o "$work/smtpd" "$work/main.o" "$work/asyncore.o" "$work/smtpd.o"
rm "$work/main.o"
g++ --coverage -o "$work/core" "$work"/*.o $objects -lpthread
SMTPD_PROGRAM="$work/smtpd" "$work/core"

report() {
    gcovr -r . "$work" -f '(asyncore|smtpd|main)\.[ch]pp' --exclude-throw-branches --exclude-unreachable-branches "$@"
}
report   # with the lines that were not run
report --branches --print-summary --fail-under-line 97 --fail-under-branch 90
