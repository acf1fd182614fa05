#!/bin/sh
# Installs what make has built below PREFIX, or takes it away. Usage: install.sh install|uninstall PREFIX.
# LIBS in the environment: what a program links with besides the library.
set -eu

cd "$(dirname "$0")/../.."
prefix=$2
version=$(sed -n 's/.* version = "[^"]* version \([0-9.]*\)".*/\1/p' smtpd.hpp)

while read -r source file; do
    if [ "$1" = uninstall ]; then
        rm -f "$prefix/$file"
        case $file in *smtpd/*) rmdir "$prefix/${file%/*}" 2>/dev/null || true ;; esac
        continue
    fi
    mkdir -p "$prefix/${file%/*}"
    case $source in
    *.in)
        sed -e 's,@PC_INCLUDEDIR@,../../include,' -e 's,@PC_LIBDIR@,..,' -e "s,@PROJECT_VERSION@,$version," \
            -e "s,@SMTPD_LIBS@,${LIBS:-}," "$source" >"$prefix/$file"
        ;;
    *) cp "$source" "$prefix/$file" ;;
    esac
done <<END
smtpd bin/smtpd
asyncore.hpp include/asyncore.hpp
smtpd.hpp include/smtpd.hpp
libsmtpd.a lib/libsmtpd.a
tests/dist/smtpd.pc.in lib/pkgconfig/smtpd.pc
tests/dist/smtpdConfig.cmake.in lib/cmake/smtpd/smtpdConfig.cmake
tests/dist/smtpdConfigVersion.cmake.in lib/cmake/smtpd/smtpdConfigVersion.cmake
tests/dist/smtpd.1 share/man/man1/smtpd.1
tests/dist/completions/smtpd.bash share/bash-completion/completions/smtpd
tests/dist/completions/_smtpd share/zsh/site-functions/_smtpd
tests/dist/completions/smtpd.fish share/fish/vendor_completions.d/smtpd.fish
LICENSE share/doc/smtpd/LICENSE
END
