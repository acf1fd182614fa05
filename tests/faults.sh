#!/bin/sh
# Builds and runs the fault injection: every system call and every allocation fails, one after the other.
# Usage: tests/faults.sh [-v] [-a] [-q] [CALL [ERROR [NUMBER [COUNT]]]]   (from the project's top)
# CXX, CXXFLAGS and LDFLAGS are respected; BUILD is the folder to build in. Linux, with GNU ld or lld.
set -e
build=${BUILD:-tests/bin/faults}
mkdir -p "$build"
wrap=
for call in accept4 bind close connect fcntl getaddrinfo gethostname getnameinfo getpeername getpwnam getsockname \
    getsockopt listen open pipe poll read recv select send setgid setgroups setsockopt setuid sigaction socket write; do
    wrap="$wrap,--wrap=$call"
done
for source in asyncore.cpp smtpd.cpp main.cpp tests/faults.cpp tests/test_faults.cpp; do
    object=$build/$(basename "$source" .cpp).o
    if [ ! -e "$object" ] || [ -n "$(find "$source" asyncore.hpp smtpd.hpp tests/faults.hpp tests/loopback.hpp -newer "$object")" ]; then
        main=
        [ "$source" != main.cpp ] || main=-Dmain=program_main
        ${CXX:-c++} $main -std=c++17 -Wall -Wextra -Wpedantic ${CXXFLAGS--O1 -g} -I. -Itests -c -o "$object" "$source"
    fi
done
${CXX:-c++} ${CXXFLAGS--O1 -g} $LDFLAGS -Wl"$wrap" -o "$build/faults" "$build"/*.o
exec "$build/faults" "$@"
