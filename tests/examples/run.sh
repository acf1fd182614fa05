#!/bin/sh
# Compiles each example, with all warnings, and runs it with real clients (drive.py; tls_test.py for those with TLS).
# Usage: run.sh [BUILDDIR [EXAMPLE...]]; it builds in BUILDDIR/examples, or in a temporary folder. CXX, CXXFLAGS and
# LDFLAGS are respected. Without Python 3 it is skipped (77), or fails when NO_SKIP=1; the same for TLS and OpenSSL.
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
PYTHONDONTWRITEBYTECODE=1
export PYTHONDONTWRITEBYTECODE
if ! command -v python3 >/dev/null; then
    echo "skipped: there is no python3"
    [ "${NO_SKIP:-}" = 1 ] && exit 1
    exit 77
fi
if [ -n "${1:-}" ]; then
    mkdir -p "$1/examples" && work=$(cd "$1/examples" && pwd) || exit 1
else
    work=$(mktemp -d) || exit 1
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
fi
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- "$here"/*.cpp tsan

cxx="${CXX:-c++} -std=c++17 -I$root"
flags="${CXXFLAGS--O1 -g} ${LDFLAGS-}"
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion"

# compile OUTPUT ARGUMENT...: a warning is a failure too.
compile() {
    output=$1
    shift
    $cxx $flags $warnings -o "$output" "$@" >"$output.log" 2>&1 && [ ! -s "$output.log" ] && return
    cat "$output.log"
    return 1
}

for source in asyncore smtpd main; do
    compile "$work/$source.o" -c "$root/$source.cpp" || touch "$work/failed" &
done
wait
[ -e "$work/failed" ] && rm "$work/failed" && exit 1

# An example and what it is linked with. Those that always use port 1025 get a free one here.
build() {
    source=$here/$1.cpp
    with="$work/asyncore.o $work/smtpd.o"
    case $1 in
    custom_server | debugging_server | senddata)
        port=$(python3 "$here/drive.py" free_port) || return 1
        sed "s/1025/$port/" "$source" >"$work/$1.cpp" || return 1
        source=$work/$1.cpp ;;
    my_smtpd) with="$with $work/main.o" ;;
    fixture_gtest) with="$with -lgtest -lgtest_main -pthread" ;;
    fixture_* | fault_server) with="$with -pthread" ;;
    echo_server | http_client | chat_room) with=$work/asyncore.o ;;   # asyncore stands alone
    tls_proxy)   # in front of tls_server
        build tls_server || return 1
        source=$here/tls_proxy.cpp ;;
    tls_*) with="$with -lssl -lcrypto -pthread" ;;
    tsan) source="$here/fixture_test.cpp $root/asyncore.cpp $root/smtpd.cpp"; with="-fsanitize=thread -pthread" ;;
    esac
    # These are lists of words.
    compile "$work/$1" $source $with
}

# Whether programs can be made with OpenSSL, and certificates.
has_openssl() {
    echo '#include <openssl/ssl.h>
        int main() { return SSL_CTX_new(TLS_method()) == nullptr; }' >"$work/openssl.cpp"
    $cxx $flags -o "$work/openssl" "$work/openssl.cpp" -lssl -lcrypto 2>/dev/null && command -v openssl >/dev/null
}

# Whether the test framework of a fixture_*.cpp is there: whether its header is.
has_framework() {
    sed -n '1,/^#include </p' "$here/$1.cpp" | grep '^#include' >"$work/framework.cpp"
    $cxx -fsyntax-only "$work/framework.cpp" 2>/dev/null
}

# Whether programs can be made with ThreadSanitizer, and run.
has_tsan() {
    echo 'int main() {}' >"$work/empty.cpp"
    $cxx $flags -fsanitize=thread -pthread -o "$work/empty" "$work/empty.cpp" 2>/dev/null && "$work/empty" 2>/dev/null
}

passed=0 failed=0 openssl=
for name in "$@"; do
    name=$(basename "$name" .cpp)
    driver=drive.py
    case $name in
    fixture_gtest | fixture_catch2 | fixture_doctest)
        if ! has_framework $name; then
            echo "skipped: $name, its framework is not installed (Debian: libgtest-dev, catch2, doctest-dev)"
            [ "${NO_SKIP:-}" = 1 ] && failed=$((failed + 1))
            continue
        fi ;;
    tls_*)
        driver=tls_test.py
        [ -n "$openssl" ] || { has_openssl && openssl=yes || openssl=no; }
        if [ $openssl = no ]; then
            echo "skipped: $name, there is no OpenSSL to compile with (Debian: libssl-dev, openssl)"
            [ "${NO_SKIP:-}" = 1 ] && failed=$((failed + 1))
            continue
        fi ;;
    esac
    case " $flags" in *-fsanitize=*) [ "$name" = tsan ] && continue ;; esac
    if [ "$name" = tsan ] && ! has_tsan; then
        echo "skipped: the fixture with ThreadSanitizer, which this compiler does not have"
        [ "${NO_SKIP:-}" = 1 ] && failed=$((failed + 1))
        continue
    fi
    port=
    if build "$name" && python3 "$here/$driver" "$name" "$work/$name" $port; then
        passed=$((passed + 1))
    else
        echo "FAILED: $name"
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
