#!/bin/sh
# Checks a program of yours against a stage: builds it, talks to it, and says what is missing.
# Usage: tests/stages/check.sh N FILE, where N is 1 to 5. It needs a compiler, and nothing else.
# CXX, CXXFLAGS and LDFLAGS are respected; BUILD is the folder to build in; CHECK_LIMIT is how many seconds the check
# waits for something, 10 by default.
set -eu
case "${1-}:$#" in
[1-5]:2) ;;
*) echo "Usage: $0 N FILE, where N is 1 to 5" >&2; exit 2 ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=${BUILD:-$root/tests/bin/stages}
mkdir -p "$build"

# compile OUTPUT SOURCE ARGUMENT...
compile() {
    output=$1
    shift
    ${CXX:-c++} -std=c++17 -Wall -Wextra -Wpedantic -Wshadow -Wconversion ${CXXFLAGS--O0} -I"$root" -o "$output" "$@"
}

# What stays the same is built once.
for name in asyncore smtpd; do
    [ -z "$(find "$root/$name.cpp" "$root/asyncore.hpp" "$root/smtpd.hpp" -newer "$build/$name.o" 2>&1)" ] ||
        compile "$build/$name.o" -c "$root/$name.cpp"
done
[ -z "$(find "$here/check.cpp" -newer "$build/check" 2>&1)" ] || compile "$build/check" "$here/check.cpp" ${LDFLAGS-}

compile "$build/program" "$2" "$build/asyncore.o" "$build/smtpd.o" ${LDFLAGS-} || {
    echo "MISSING: the program does not compile: the compiler says why, above"
    exit 1
}
exec "$build/check" "$1" "$build/program"
