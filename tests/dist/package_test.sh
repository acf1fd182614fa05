#!/bin/sh
# Makes the .deb, installs it, uses it, removes it, and looks that nothing stays behind.
# Usage: package_test.sh BUILD [--system]. BUILD is a CMake build. The package is installed in a directory of its
# own, which needs no privilege; with --system, for a machine that is thrown away, into the system.
# Exit status 77 where there is no cpack or no dpkg, unless NO_SKIP is set.
set -eu

build=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' "$root/smtpd.hpp")
for tool in cpack dpkg dpkg-shlibdeps; do
    if ! command -v $tool >/dev/null && [ -z "${NO_SKIP:-}" ]; then
        echo "skipped: there is no $tool"
        exit 77
    fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
chmod 755 "$work"

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

cpack --config "$build/CPackConfig.cmake" -G DEB -B "$work" >"$work/log" 2>&1 || { cat "$work/log"; fail "cpack"; }
deb=$(ls "$work"/*.deb)
[ "$(dpkg-deb -f "$deb" Version)" = "$version" ] || fail "the version is $(dpkg-deb -f "$deb" Version)"
dpkg-deb -f "$deb" Depends | grep -q libstdc++6 || fail "the dependencies are $(dpkg-deb -f "$deb" Depends)"
dpkg-deb -c "$deb" >"$work/contents"
grep -v ' root/root ' "$work/contents" && fail "these files are not root's"
awk '/^d/ && !/^drwxr-xr-x/ || /^-/ && !/^-rw[x-]r-[x-]r-[x-]/ { print; bad = 1 } END { exit !bad }' "$work/contents" &&
    fail "these files have strange modes"
for file in bin/smtpd include/asyncore.hpp include/smtpd.hpp share/man/man1/smtpd.1; do
    grep -q " \./usr/$file\$" "$work/contents" || fail "there is no /usr/$file in it"
done
echo "ok: $(basename "$deb")"

if [ "${2:-}" = --system ]; then
    place=
    set -- dpkg
else
    place=$work/system
    mkdir -p "$place/var/lib/dpkg/info" "$place/var/lib/dpkg/updates" "$place/var/lib/dpkg/triggers"
    : >"$place/var/lib/dpkg/status"
    PATH=$PATH:/usr/sbin:/sbin
    set -- dpkg --root="$place" --log=/dev/null --force-not-root --force-depends --force-script-chrootless
fi
"$@" -i "$deb" >"$work/log" 2>&1 || { cat "$work/log"; fail "dpkg -i"; }
"$place/usr/bin/smtpd" --version | grep -q " $version\$" || fail "the program does not run"
PKG_CONFIG_PATH=$(dirname "$("$@" -L smtpd | sed -n "s|^/|$place/|; /smtpd\.pc\$/p")")
export PKG_CONFIG_PATH
if command -v pkg-config >/dev/null; then
    ${CXX:-c++} -std=c++17 -o "$work/consumer" "$root/tests/consumer/message.cpp" $(pkg-config --cflags --libs smtpd)
    LD_LIBRARY_PATH=$(dirname "$PKG_CONFIG_PATH") "$work/consumer" || fail "a program with the library"
fi
echo "ok: installed, and it works"

"$@" -L smtpd | sort >"$work/files"
"$@" -r smtpd >"$work/log" 2>&1 || { cat "$work/log"; fail "dpkg -r"; }
while read -r file; do
    [ -d "$place$file" ] && case $file in *smtpd*) fail "$file stays behind" ;; *) continue ;; esac
    [ ! -e "$place$file" ] || fail "$file stays behind"
done <"$work/files"
echo "ok: removed, and nothing is left"
