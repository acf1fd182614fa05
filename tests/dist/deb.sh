#!/bin/sh
# Makes Debian's packages: smtpd, the program, and libsmtpd-dev, to build with the library.
# Usage: deb.sh [DIRECTORY], by default the `dist` beside the sources. From the environment: DEBFULLNAME and DEBEMAIL,
# whose packages they are, and SOURCE_DATE_EPOCH, as Debian's tools have them; CXX. It needs cmake and dpkg-dev.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/dist}
mkdir -p "$out"
out=$(cd "$out" && pwd)
version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' "$root/smtpd.hpp")
maintainer="${DEBFULLNAME:-The smtpd authors} <${DEBEMAIL:-smtpd@smtpd.invalid}>"
: "${SOURCE_DATE_EPOCH:=$(git -C "$root" log -1 --format=%ct 2>/dev/null || date +%s)}"
export SOURCE_DATE_EPOCH
umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"

export DEB_BUILD_MAINT_OPTIONS=hardening=+all
CXXFLAGS="$(dpkg-buildflags --get CXXFLAGS) $(dpkg-buildflags --get CPPFLAGS) -g0 -ffile-prefix-map=$root=." \
    LDFLAGS=$(dpkg-buildflags --get LDFLAGS) cmake -S "$root" -B build -DCMAKE_BUILD_TYPE=None -DSMTPD_TESTS=OFF \
    -DCMAKE_INSTALL_PREFIX=/usr -DCMAKE_INSTALL_LIBDIR="lib/$(dpkg-architecture -q DEB_HOST_MULTIARCH)" >log 2>&1 &&
    cmake --build build >>log 2>&1 && DESTDIR=$work/all cmake --install build --strip >>log || { cat log; exit 1; }

cat >changelog <<END
smtpd ($version) unstable; urgency=medium

  * Version $version; README.md tells what it has.

 -- $maintainer  $(date -R -u -d "@$SOURCE_DATE_EPOCH")
END

# package NAME SECTION DESCRIPTION...: what is in $work/NAME; further fields of control come from standard input.
package() {
    name=$1
    documents=$name/usr/share/doc/$name
    mkdir -p "$name/DEBIAN" "$documents"
    cp "$root/LICENSE" "$documents/copyright"
    gzip -9n <changelog >"$documents/changelog.gz"
    (cd "$name" && find usr -type f | LC_ALL=C sort | xargs md5sum >DEBIAN/md5sums)
    {
        printf '%s\n' "Package: $name" "Version: $version" "Architecture: $(dpkg --print-architecture)" \
            "Maintainer: $maintainer" "Installed-Size: $(du -k -s "$name/usr" | cut -f 1)" "Priority: optional"
        cat
    } >"$name/DEBIAN/control"
    dpkg-deb --root-owner-group --build "$name" "$out" >/dev/null
    echo "$out/${name}_${version}_$(dpkg --print-architecture).deb"
}

mkdir -p smtpd/usr/share smtpd/DEBIAN debian libsmtpd-dev
mv all/usr/bin smtpd/usr
mv all/usr/share/man all/usr/share/bash-completion all/usr/share/fish smtpd/usr/share
mkdir smtpd/usr/share/zsh
mv all/usr/share/zsh/site-functions smtpd/usr/share/zsh/vendor-completions
gzip -9n smtpd/usr/share/man/man1/smtpd.1
printf 'Source: smtpd\n\nPackage: smtpd\nArchitecture: any\n' >debian/control   # which dpkg-shlibdeps wants
depends=$(dpkg-shlibdeps -O smtpd/usr/bin/smtpd | sed -n 's/^shlibs:Depends=//p')
package smtpd <<END
Section: mail
Depends: $depends
Description: SMTP server for testing and for passing mail on
 The SMTP server that Python had as its module smtpd, with the same options
 and the same conversation: it prints each message that it receives, passes
 it on to another server, or gives it to the mailing lists of Mailman 3.
END

rm -r all/usr/share
mv all/usr libsmtpd-dev/usr
package libsmtpd-dev <<END
Section: libdevel
Multi-Arch: same
Suggests: cmake, pkg-config
Description: SMTP server to build into C++ programs
 Python's modules smtpd, asynchat and asyncore in C++17: an SMTP server for
 test suites, devices and mail filters, and the event-driven loop that it
 stands on. The library is a static one, and needs no other.
 .
 These are the headers, the library, and the files for CMake and pkg-config.
END
