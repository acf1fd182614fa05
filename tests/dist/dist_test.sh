#!/bin/sh
# `make dist` in a checkout of its own: the files are there, their checksums are right, and the tarball builds and
# tests itself in an empty folder, with make and with CMake, also when a project fetches it.
# Usage: dist_test.sh. CXX and CORE_OBJECTS (a folder of the core tests' objects, which are compiled here without it)
# come from the environment. Exit status 77 without git or outside a checkout, unless NO_SKIP is set.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' "$root/smtpd.hpp")
work=$(mktemp -d)
chmod 755 "$work"   # the program is run as another user, too
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

if [ "$(git -C "$root" rev-parse --show-toplevel 2>/dev/null)" != "$(cd "$root" && pwd -P)" ]; then
    [ -z "${NO_SKIP:-}" ] || fail "that is no checkout of git"
    echo "skipped: that is no checkout of git"
    exit 77
fi

# A clone, with what is changed and not committed yet.
git clone -q "$root" "$work/checkout"
git -C "$root" diff --binary HEAD >"$work/changes"
[ ! -s "$work/changes" ] || git -C "$work/checkout" apply "$work/changes"
cd "$work/checkout"
make dist >"$work/log" 2>&1 || { cat "$work/log"; fail "make dist"; }
grep skipped "$work/log" || true
cd dist
for file in smtpd-$version.tar.gz smtpd.hpp smtpd.cpp fixture.hpp; do
    [ -s $file ] && grep -q " $file\$" SHA256SUMS || fail "there is no $file, or no checksum of it"
done
ls | grep -v '^SHA256SUMS$' | sort >../files
awk '{ print $2 }' SHA256SUMS | sort | diff ../files - || fail "SHA256SUMS does not name the files"
if command -v sha256sum >/dev/null; then sha256sum --quiet -c SHA256SUMS || fail "the checksums"; fi
for program in smtpd-*-linux-musl; do
    [ -e "$program" ] || continue
    ./"$program" --version | grep -q " $version\$" || fail "$program does not run"
    ! command -v ldd >/dev/null || ! ldd ./"$program" >/dev/null 2>&1 || fail "$program is not static"
    echo "ok: $program"
done
gzip -dc smtpd-$version.tar.gz >"$work/first.tar"
(cd .. && sh tests/dist/dist.sh >/dev/null 2>&1 && gzip -dc dist/smtpd-$version.tar.gz | cmp - "$work/first.tar") ||
    [ -s "$work/changes" ] || fail "two runs differ"
echo "ok: the files and their checksums"

# What is in the tarball is what git knows, but .ci.
mkdir "$work/empty"
cd "$work/empty"
tar xf "$work/first.tar"
cd smtpd-$version
git -C "$work/checkout" ls-files | grep -v '^\.ci/' | sort >"$work/known"
find . -type f | sed 's|^\./||' | sort | diff "$work/known" - || fail "the tarball holds other files than git"

# The core tests' objects need not be compiled again: they are newer than the sources.
make CXX="${CXX:-c++}" CXXFLAGS=-O0 smtpd >"$work/log" 2>&1 || { cat "$work/log"; fail "make"; }
for object in $(find "${CORE_OBJECTS:-/nonexistent}" -name '*.o' 2>/dev/null); do
    name=${object##*/}
    cp "$object" "tests/${name%.cpp.o}.o"
done
make CXX="${CXX:-c++}" CXXFLAGS=-O0 test >"$work/log" 2>&1 || { tail -40 "$work/log"; fail "make test"; }
grep -E '^[0-9]+ passed, 0 failed' "$work/log" || { cat "$work/log"; fail "make test ran no test"; }
make clean >/dev/null
find . -type f | sed 's|^\./||' | sort | diff "$work/known" - || fail "make clean leaves something, or takes too much"
echo "ok: it builds and tests itself in an empty folder"

if command -v cmake >/dev/null; then
    cp "$root/tests/consumer/message.cpp" "$work"
    mkdir "$work/project"
    cat >"$work/project/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.16)
project(project LANGUAGES CXX)
include(FetchContent)
FetchContent_Declare(smtpd URL "$work/checkout/dist/smtpd-$version.tar.gz")
FetchContent_MakeAvailable(smtpd)
add_executable(consumer ../message.cpp)
target_link_libraries(consumer PRIVATE smtpd::smtpd)
END
    { cmake -S "$work/project" -B "$work/build" -DCMAKE_BUILD_TYPE=Debug && cmake --build "$work/build"; } >"$work/log" 2>&1 &&
        "$work/build/consumer" || { cat "$work/log"; fail "a project that fetches it"; }
    echo "ok: a project fetches it"
fi
