#!/bin/sh
# The files of a release: the sources in a tarball, the two files of amalgamate.sh (which `make amalgamation` has made),
# a static program for Linux when there is Zig, and SHA256SUMS.
# Usage: dist.sh [DIRECTORY], by default the `dist` beside the sources. It takes git, and a checkout.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/dist}
cd "$root"
version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' smtpd.hpp)
if [ "$(git rev-parse --show-toplevel 2>/dev/null)" != "$(pwd -P)" ]; then
    echo "dist.sh: a release is made from a checkout of git" >&2
    exit 1
fi

commit=$(git -c user.name=smtpd -c user.email=smtpd@smtpd.invalid stash create)   # nothing when nothing is changed
[ -z "$commit" ] || echo "dist.sh: with changes that are not committed" >&2
git archive --prefix="smtpd-$version/" "${commit:-HEAD}" -- . ':!.ci' | gzip -9n >"$out/smtpd-$version.tar.gz"

rm -f "$out"/smtpd-*-linux-musl
. tests/dist/zig.sh
machine=$(uname -m)
if find_zig; then
    "$ZIG" c++ -target "$machine-linux-musl" -static -s -O2 -std=c++17 -w -I. -o "$out/smtpd-$version-$machine-linux-musl" \
        main.cpp smtpd.cpp asyncore.cpp 2>"$out/log" || { cat "$out/log" >&2; exit 1; }
    rm "$out/log"   # which is long when Zig has built its library
else
    echo "skipped: the static program: there is no Zig; tests/dist/unix.sh linux-musl-static installs it"
fi

cd "$out"
sum=sha256sum
command -v sha256sum >/dev/null || sum="shasum -a 256"
$sum "smtpd-$version"* smtpd.[ch]pp $(ls fixture.hpp 2>/dev/null) >SHA256SUMS
echo "$out:"
cat SHA256SUMS
