#!/bin/sh
# Builds the examples in tests/examples/bin; `make examples` calls it, with the library's objects made. An example that
# needs OpenSSL is left out, and told, where that is missing.
set -u
cd "$(dirname "$0")/../.." && mkdir -p tests/examples/bin || exit 1
status=0
for source in tests/examples/*.cpp; do
    name=$(basename "$source" .cpp)
    with="asyncore.o smtpd.o"
    case $name in
    my_smtpd) with="main.o $with" ;;   # it is a class behind the program's own command line
    esac
    if grep -q '^#include "fixture.hpp"' "$source"; then with="$with -pthread"; fi
    if grep -q '^#include "tls.hpp"' "$source" || grep -q '^#include <openssl/' "$source"; then
        with="$with -lssl -lcrypto"
        if ! echo '#include <openssl/ssl.h>' | ${CXX:-c++} -E -x c++ - >/dev/null 2>&1; then
            echo "left out: $name (there is no OpenSSL)"
            continue
        fi
    fi
    # These are lists of words.
    if ${CXX:-c++} -std=c++17 ${CXXFLAGS--O2} -I. -o "tests/examples/bin/$name" "$source" ${LDFLAGS-} $with; then
        echo "tests/examples/bin/$name"
    else
        echo "FAILED: $name" && status=1
    fi
done
exit $status
