#!/bin/sh
# Builds the library into projects of every kind, as their owners would, and runs each: a message must go through.
# Usage: run.sh [BUILD [NAME...]]. BUILD is a CMake build of the library (one is made when it is not given, or is
# ""), NAME one of: find_package find_package_shared add_subdirectory FetchContent pkg_config pkg_config_shared
# make_install make_install_find_package sockets_elsewhere two_files loop_alone no_rtti. Without CMake or pkg-config what needs them is skipped (exit status
# 77), or fails when NO_SKIP is set.
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=${1:-}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- find_package find_package_shared add_subdirectory FetchContent pkg_config pkg_config_shared \
    make_install make_install_find_package sockets_elsewhere two_files loop_alone no_rtti
CXX=${CXX:-c++}
export CXX
flags="-std=c++17 -O0 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"

cmake_build() {   # DIRECTORY SOURCE OPTION...
    directory=$1
    source=$2
    shift 2
    cmake -S "$source" -B "$directory" -G "Unix Makefiles" -DCMAKE_BUILD_TYPE=Debug "$@" && cmake --build "$directory" -j "${JOBS:-2}"
}

# The library installed below $work/NAME, static or shared; an installation may be moved, so this one is.
installed() {   # static|shared
    [ -d "$work/$1" ] && return
    if [ "$1" = shared ] || [ -z "$build" ]; then
        [ "$1" = shared ] && shared=ON || shared=OFF
        cmake_build "$1-build" "$root" -DSMTPD_TESTS=OFF -DBUILD_SHARED_LIBS=$shared || return 1
        cmake --install "$1-build" --prefix "$work/$1-first" || return 1
    else
        cmake --install "$build" --prefix "$work/$1-first" || return 1
    fi
    mv "$1-first" "$1"
    "$1/bin/smtpd" --version
}

pc() {   # PREFIX: where its smtpd.pc lies
    dirname "$(find "$1" -name smtpd.pc)"
}

with_pkg_config() {   # PREFIX
    PKG_CONFIG_PATH=$(pc "$1")
    export PKG_CONFIG_PATH
    [ "smtpd $(pkg-config --modversion smtpd)" = "smtpd $version" ] || return 1
    $CXX $flags -o consumer "$here/message.cpp" $(pkg-config --cflags --libs smtpd) &&
        LD_LIBRARY_PATH=$(dirname "$PKG_CONFIG_PATH") ./consumer
}

with_find_package() {   # PREFIX
    cmake_build out "$here/find_package" -DCMAKE_PREFIX_PATH="$1" -Dversion="$version" && out/consumer &&
        ! cmake -S "$here/find_package" -B other -DCMAKE_PREFIX_PATH="$1" -Dversion="$((${version%%.*} + 1)).0"
}

find_package() {
    installed static && with_find_package "$work/static"
}

find_package_shared() {
    installed shared && with_find_package "$work/shared" &&
        ls shared/lib*/libsmtpd.so."${version%%.*}"
}

add_subdirectory() {
    cmake_build out "$here/add_subdirectory" && out/consumer &&
        [ "$(find out \( -name smtpd -o -name core \) -type f | wc -l)" -eq 0 ]   # neither program nor tests
}

FetchContent() {
    cmake_build out "$here/FetchContent" && out/consumer
}

pkg_config() {
    installed static && with_pkg_config "$work/static"
}

pkg_config_shared() {
    installed shared && with_pkg_config "$work/shared"
}

# With the Makefile: into DESTDIR, from where it is moved to its prefix, with a library that it needs besides (any will
# do). The uninstall leaves nothing behind.
made() {
    [ -d "$work/made" ] && return
    mkdir copy && cp "$root"/Makefile "$root"/*.?pp copy && mkdir copy/tests && cp -R "$root/tests/dist" copy/tests || return 1
    for file in README.md LICENSE; do [ ! -f "$root/$file" ] || cp "$root/$file" copy; done
    (cd copy && make CXX="$CXX" CXXFLAGS=-O0 && make CXX="$CXX" CXXFLAGS=-O0 LIBS="-lm -lc" install PREFIX=/moved DESTDIR="$work/stage") &&
        mkdir left && cp -R stage/moved left && (cd copy && make uninstall PREFIX=/moved DESTDIR="$work/left") &&
        [ -z "$(find left -type f)" ] && mv stage/moved made && made/bin/smtpd --version
}

make_install() {
    made && with_pkg_config "$work/made" && cmp "$root/LICENSE" made/share/doc/smtpd/LICENSE || return 1
    case $(pkg-config --static --libs smtpd) in *-lsmtpd*-lm*-lc*) ;; *) return 1 ;; esac
}

make_install_find_package() {
    made && with_find_package "$work/made" && grep -e '-lm *-lc' out/CMakeFiles/consumer.dir/link.txt
}

# On a system that has sockets in libraries of their own, CMake finds those. Nothing is compiled here.
sockets_elsewhere() {
    mkdir sockets && ar rc sockets/libsocket.a && ar rc sockets/libnsl.a &&
        cmake -S "$root" -B elsewhere -G "Unix Makefiles" -DSMTPD_TESTS=OFF -DSMTPD_SOCKETS_IN_LIBC=OFF \
            -DCMAKE_LIBRARY_PATH="$work/sockets" && grep '^Libs.private: -lsocket -lnsl$' elsewhere/smtpd.pc &&
        grep -e 'libsmtpd\.a.*-lsocket -lnsl' elsewhere/CMakeFiles/smtpd_program.dir/link.txt
}

two_files() {
    "$root/tests/dist/amalgamate.sh" dist && $CXX $flags -Idist -o consumer "$here/message.cpp" dist/smtpd.cpp && ./consumer
}

loop_alone() {
    mkdir loop && cp "$root/asyncore.hpp" "$root/asyncore.cpp" "$here/echo.cpp" loop &&
        $CXX $flags -o consumer loop/echo.cpp loop/asyncore.cpp && ./consumer
}

no_rtti() {
    $CXX $flags -fno-rtti -I"$root" -o consumer "$here/message.cpp" "$root/asyncore.cpp" "$root/smtpd.cpp" && ./consumer
}

version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' "$root/smtpd.hpp")
passed=0 failed=0 skipped=0
for name in "$@"; do
    tool=sh
    case $name in
    *find_package* | add_subdirectory | FetchContent | sockets_elsewhere) tool=cmake ;;
    pkg_config*) tool=pkg-config ;;
    make_install) tool=pkg-config ;;
    esac
    if ! command -v $tool >/dev/null && [ -z "${NO_SKIP:-}" ]; then
        echo "skipped: $name: there is no $tool"
        skipped=$((skipped + 1))
        continue
    fi
    if "$name" >"$work/log" 2>&1; then
        echo "ok: $name"
        passed=$((passed + 1))
    else
        cat "$work/log"
        echo "FAILED: $name"
        failed=$((failed + 1))
    fi
    rm -rf out other consumer
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] || exit 1
[ $passed -gt 0 ] || exit 77
