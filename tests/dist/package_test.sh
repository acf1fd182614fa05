#!/bin/sh
# Makes the two .deb, has lintian look at them, installs them, uses them, removes them, and looks that nothing stays
# behind. Usage: package_test.sh [--system]. They are installed in a directory of its own, which needs no privilege;
# with --system, for a machine that is thrown away, into the system.
# Exit status 77 where there is no cmake or no dpkg, unless NO_SKIP is set.
set -eu

system=${1:-}
root=$(cd "$(dirname "$0")/../.." && pwd)
version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' "$root/smtpd.hpp")
for tool in cmake dpkg dpkg-shlibdeps lintian; do
    if ! command -v $tool >/dev/null && [ -z "${NO_SKIP:-}" ]; then
        echo "skipped: there is no $tool"
        [ $tool = lintian ] || exit 77
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

sh "$root/tests/dist/deb.sh" "$work" >"$work/log" 2>&1 || { cat "$work/log"; fail "deb.sh"; }
program=$(ls "$work"/smtpd_*.deb) library=$(ls "$work"/libsmtpd-dev_*.deb)
dpkg-deb -f "$program" Depends | grep -q libstdc++6 || fail "the dependencies are $(dpkg-deb -f "$program" Depends)"
for deb in "$program" "$library"; do
    [ "$(dpkg-deb -f "$deb" Version)" = "$version" ] || fail "the version is $(dpkg-deb -f "$deb" Version)"
    dpkg-deb -c "$deb" >"$work/contents"
    grep -v ' root/root ' "$work/contents" && fail "these files are not root's"
    awk '/^d/ && !/^drwxr-xr-x/ || /^-/ && !/^-rw[x-]r-[x-]r-[x-]/ { print; bad = 1 } END { exit !bad }' "$work/contents" &&
        fail "these files have strange modes"
    case $deb in
    "$program") set -- bin/smtpd share/man/man1/smtpd.1.gz share/bash-completion/completions/smtpd \
        share/zsh/vendor-completions/_smtpd share/fish/vendor_completions.d/smtpd.fish share/doc/smtpd/copyright ;;
    *) set -- include/asyncore.hpp include/smtpd.hpp 'lib/.*/libsmtpd.a' 'lib/.*/cmake/smtpd/smtpdConfig.cmake' \
        'lib/.*/pkgconfig/smtpd.pc' share/doc/libsmtpd-dev/copyright ;;
    esac
    for file in "$@"; do grep -q " \./usr/$file\$" "$work/contents" || fail "there is no /usr/$file in $deb"; done
    echo "ok: ${deb##*/}"
done
if command -v lintian >/dev/null; then
    lintian --allow-root --fail-on error,warning "$program" "$library" || fail "lintian"
    echo "ok: lintian finds neither error nor warning"
fi

if [ "$system" ]; then
    place=
    set -- dpkg
else
    place=$work/system
    mkdir -p "$place/var/lib/dpkg/info" "$place/var/lib/dpkg/updates" "$place/var/lib/dpkg/triggers"
    : >"$place/var/lib/dpkg/status"
    PATH=$PATH:/usr/sbin:/sbin
    set -- dpkg --root="$place" --log=/dev/null --force-not-root --force-depends --force-script-chrootless
fi
"$@" -i "$program" "$library" >"$work/log" 2>&1 || { cat "$work/log"; fail "dpkg -i"; }
"$place/usr/bin/smtpd" --version | grep -q " $version\$" || fail "the program does not run"
"$@" -L libsmtpd-dev >"$work/files"
PKG_CONFIG_PATH=$(dirname "$(sed -n "s|^/|$place/|; /smtpd\.pc\$/p" "$work/files")")
export PKG_CONFIG_PATH
if command -v pkg-config >/dev/null; then
    ${CXX:-c++} -std=c++17 -o "$work/consumer" "$root/tests/consumer/message.cpp" $(pkg-config --cflags --libs smtpd)
    "$work/consumer" || fail "a program with the library"
fi
echo "ok: installed, and they work"

"$@" -L smtpd | sort - "$work/files" >"$work/all"
"$@" -r smtpd libsmtpd-dev >"$work/log" 2>&1 || { cat "$work/log"; fail "dpkg -r"; }
while read -r file; do
    [ -d "$place$file" ] && case $file in *smtpd*) fail "$file stays behind" ;; *) continue ;; esac
    [ ! -e "$place$file" ] || fail "$file stays behind"
done <"$work/all"
echo "ok: removed, and nothing is left"
