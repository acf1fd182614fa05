#!/bin/sh
# Builds the project for every system and compiler that this machine has the tools for, runs the core tests where
# it can, and prints what came of it. Usage: unix.sh [--quick] [--list] [TARGET...]
#
# --quick  the core tests for one target of a kind only; for the others the library and the program, or nothing
# --list   print the targets, with what each needs
#
# From the environment: JOBS, how many targets are built at once (2); LOGS, a directory to leave their output in;
# ONLY, a pattern for the core tests; ZIG and ZIG_CACHE, see below.
#
# Debian's packages for all of it: g++-12 clang-14 libc++-14-dev libc++abi-14-dev g++-12-multilib
# g++-12-s390x-linux-gnu g++-12-arm-linux-gnueabihf g++-12-mips-linux-gnu qemu-user-static make bmake npm. Musl and what
# is not Linux is compiled with Zig, which is installed at the first use (see zig.sh). Mips is not: pipe() returns the
# wrong thing there with Zig's C library.
#
# A target whose tool is missing is skipped, or fails when NO_SKIP is set. Exit status: 0, 1 when a target failed,
# 77 when all were skipped.
set -u

root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/tests/dist/zig.sh"
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"

# NAME|HOW|THE SAME WHEN QUICK|TOOL|COMPILER|RUN WITH, the slowest first. HOW is one of: run (the core tests),
# build (library and program, which is run), link (that, not run), make (the Makefile), - (nothing, unless the target is
# named).
targets() {
    cat <<END
linux-s390x|run|run|qemu-s390x-static|s390x-linux-gnu-g++-12 -std=c++17|qemu-s390x-static -L /usr/s390x-linux-gnu
linux-armhf|run|run|qemu-arm-static|arm-linux-gnueabihf-g++-12 -Wno-psabi -D_FILE_OFFSET_BITS=64 -std=c++17|qemu-arm-static -L /usr/arm-linux-gnueabihf
musl-riscv64|run|-|zig|zig c++ -target riscv64-linux-musl -static -std=c++17|qemu-riscv64-static
musl-ppc64le|run|-|zig|zig c++ -target powerpc64le-linux-musl -static -std=c++17|qemu-ppc64le-static
linux-mips|run|-|qemu-mips-static|mips-linux-gnu-g++-12 -std=c++17|qemu-mips-static -L /usr/mips-linux-gnu
musl-aarch64|run|-|zig|zig c++ -target aarch64-linux-musl -static -std=c++17|qemu-aarch64-static
linux-musl-static|run|run|zig|zig c++ -target x86_64-linux-musl -static -std=c++17|
freebsd-x86_64|link|link|zig|zig c++ -target x86_64-freebsd -std=c++17|
netbsd-x86_64|link|link|zig|zig c++ -target x86_64-netbsd -std=c++17|
openbsd-x86_64|link|link|zig|zig c++ -target x86_64-openbsd -std=c++17|
macos-x86_64|link|link|zig|zig c++ -target x86_64-macos -std=c++17|
macos-aarch64|link|link|zig|zig c++ -target aarch64-macos -std=c++17|
linux-32bit|run|run|g++-12|g++-12 -m32 -isystem /usr/include/x86_64-linux-gnu -std=c++17|
g++-12-c++17|run|build|g++-12|g++-12 -std=c++17|
g++-12-c++20|run|build|g++-12|g++-12 -std=c++20|
g++-12-c++23|run|build|g++-12|g++-12 -std=c++23|
clang-14-c++17|run|build|clang++-14|clang++-14 -std=c++17|
clang-14-c++20|run|build|clang++-14|clang++-14 -std=c++20|
clang-14-c++23|run|build|clang++-14|clang++-14 -std=c++2b|
clang-14-libc++-c++17|run|run|clang++-14|clang++-14 -stdlib=libc++ -std=c++17|
clang-14-libc++-c++20|run|build|clang++-14|clang++-14 -stdlib=libc++ -std=c++20|
clang-14-libc++-c++23|run|build|clang++-14|clang++-14 -stdlib=libc++ -std=c++2b|
make-gnu|make test|make|make|make|
make-bmake|make test|make|bmake|bmake|
make-posix|make test|make|make|env POSIXLY_CORRECT=1 make -rR --warn-undefined-variables|
END
}

# Object files of the sources named, in the current directory. $1: the compiler with its options.
compile() {
    with=$1
    shift
    for source in "$@"; do
        $with -O0 -I"$root" -c -o "$(basename "$source" .cpp).o" "$root/$source" || return 1
    done
}

# Library and program; $1: the compiler, $2: what the program is run with, or `link`.
build() {
    compile "$1 $warnings" asyncore.cpp smtpd.cpp main.cpp && $1 -w -O0 -o smtpd main.o smtpd.o asyncore.o || return 1
    [ "$2" = link ] || $2 ./smtpd --version
}

# The same, and the core tests, which run the program.
core_tests() {
    rm -f main.o
    compile "$1" $("$root/tests/dist/core_sources.sh") && $1 -w -O0 -o core *.o -lpthread || return 1
    printf '#!/bin/sh\nexec %s "%s" "$@"\n' "$2" "$PWD/smtpd" >program
    chmod +x program
    (work=$PWD && cd "$root" && SMTPD_PROGRAM=$work/program $2 "$work/core" ${ONLY:-})
}

# The Makefile, in a copy of the sources; $1: the program make, $2: `test` or nothing.
makefile() {
    [ "$(sed 1q "$root/Makefile")" = .POSIX: ] || { echo "the Makefile does not begin with .POSIX:"; return 1; }
    grep -n -E ':=|\?=|\+=|^[ -]*(ifn?eq|ifn?def|include|define)|\$\((shell|wildcard|patsubst)|%' "$root/Makefile" &&
        { echo "that is not POSIX"; return 1; }
    "$root/tests/dist/core_sources.sh" | sed 's/cpp$/o/' | LC_ALL=C sort >want
    sed -n '/^TESTS *=/,/[^\\]$/p' "$root/Makefile" | tr ' \t' '\n\n' | grep '\.o$' | LC_ALL=C sort | diff want - ||
        { echo "TESTS in the Makefile is not what is in tests/"; return 1; }
    mkdir -p copy/tests
    cp "$root"/*.?pp "$root/Makefile" "$root/README.md" "$root/LICENSE" copy
    cp "$root"/tests/*.?pp copy/tests && cp -R "$root/tests/examples" "$root/tests/dist" "$root/tests/fuzz" "$root/tests/reference" copy/tests || return 1
    (
        cd copy
        ls . tests >../before
        for goal in all install uninstall amalgamation $2; do
            $1 CXXFLAGS=-O0 DESTDIR="$PWD/stage" $goal || exit 1
            [ $goal != install ] || stage/usr/local/bin/smtpd --version || exit 1
            [ $goal != uninstall ] || [ -z "$(find stage -type f)" ] || { find stage -type f; exit 1; }
        done
        $1 -n test run >/dev/null && $1 clean && rm -rf stage || exit 1
        ls . tests | diff ../before - || { echo "make clean leaves that"; exit 1; }
    ) >log 2>&1 || { cat log; return 1; }
    cat log
    ! grep -i 'warning:' log
}

# One target: writes its line to RESULTS/NAME, and what the compilers said to RESULTS/NAME.log.
one() {
    name=$1
    IFS='|' read -r name full quick tool compiler runner <<END
$(targets | grep "^$name|")
END
    [ -z "${QUICK:-}" ] || [ "$quick" = - ] || full=$quick
    work=$RESULTS/$name.work
    mkdir -p "$work"
    cd "$work"
    [ "$tool" != zig ] || { tool=${ZIG:-zig} && compiler=$tool${compiler#zig}; }
    missing=
    for tool in "$tool" "${compiler%% *}" "${runner%% *}"; do
        [ -z "$tool" ] || command -v "$tool" >/dev/null || missing="there is no $tool"
    done
    if [ "$missing" ]; then
        result="skipped: $missing"
        [ -z "${NO_SKIP:-}" ] || result="FAILED: $missing"
    else
        done=built
        case $full in
        run) build "$compiler" "$runner" && core_tests "$compiler" "$runner" ;;
        build) build "$compiler" "$runner" ;;
        link) done="compiled and linked only" && build "$compiler" link ;;
        make) done="built, installed, uninstalled" && makefile "$compiler" "" ;;
        "make test") done="built, installed, uninstalled" && makefile "$compiler" test ;;
        esac >../$name.log 2>&1 && result="$done" || result="FAILED"
        ran=$(grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' ../$name.log | tail -n 1)
        [ -z "$ran" ] || result="$result; core tests: $ran"
    fi
    cd "$RESULTS"
    rm -rf "$work"
    echo "$result" >"$name"
    case $result in FAILED*) sed "s/^/$name: /" "$name.log" 2>/dev/null | tail -n 60 ;; esac
    echo "$name: $result"
}

if [ "${1:-}" = --one ]; then
    one "$2"
    exit
fi
QUICK=
while :; do
    case ${1:-} in
    --quick) QUICK=yes ;;
    --list) targets | awk -F'|' '{ printf "%-24s%-18s%s\n", $1, $4, $5 }'; exit ;;
    *) break ;;
    esac
    shift
done
RESULTS=${LOGS:-$(mktemp -d)}
mkdir -p "$RESULTS" && chmod 755 "$RESULTS" || exit 1   # the program is run as another user, too
[ -n "${LOGS:-}" ] || trap 'rm -rf "$RESULTS"' EXIT
trap 'exit 1' HUP INT TERM
export QUICK RESULTS
[ $# -gt 0 ] || set -- $(targets | awk -F'|' -v quick="$QUICK" '!(quick && $3 == "-") { print $1 }')
for name in "$@"; do
    targets | grep -q "^$name|" || { echo "there is no target $name; --list names them" >&2; exit 1; }
done
case $* in *bsd* | *macos* | *musl*) find_zig get || ZIG= ;; esac
printf '%s\n' "$@" | xargs -P "${JOBS:-2}" -n 1 sh "$0" --one

echo
for name in "$@"; do printf '%-24s%s\n' "$name" "$(cat "$RESULTS/$name" 2>/dev/null || echo 'FAILED: ended early')"; done >"$RESULTS/all"
cat "$RESULTS/all"
built=$(grep -c -E ' (built|compiled)' "$RESULTS/all")
failed=$(grep -c ' FAILED' "$RESULTS/all")
skipped=$(grep -c ' skipped' "$RESULTS/all")
echo "targets: $built passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] || exit 1
[ "$built" -gt 0 ] || exit 77
