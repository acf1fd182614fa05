#!/bin/sh
# The two files of amalgamate.sh do as well as the four that they are made of: no warnings, with RTTI and without;
# a header for any number of translation units; no symbol outside our namespaces and no macro but the include
# guards, which holds for the four as well; and the core tests pass. The third file, fixture.hpp, passes its own tests.
# Usage: amalgamation_test.sh. CXX, JOBS (at once) and CORE_OBJECTS (a folder of the core tests' objects, which are
# compiled here without it) come from the environment.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
CXX=${CXX:-c++}
strict="-std=c++17 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
work=$(mktemp -d)
chmod 755 "$work"   # the program is run as another user, too
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

"$root/tests/dist/amalgamate.sh" "$work/dist" >/dev/null
cd "$work"

# Nothing of the machine, and nothing that needs a third file.
grep -l "$root" dist/* && fail "the sources' own path is in it"
grep -n '^ *# *include "' dist/smtpd.hpp && fail "the header includes one of ours"
[ "$(grep '^ *# *include "' dist/smtpd.cpp)" = '#include "smtpd.hpp"' ] || fail "the source includes more than its header"
[ "$(grep '^ *# *include "' dist/fixture.hpp)" = '#include "smtpd.hpp"' ] || fail "the fixture includes more than the header"
for file in dist/smtpd.hpp dist/smtpd.cpp dist/fixture.hpp; do
    grep '^ *# *include <' $file | sort | uniq -d | grep . && fail "$file includes these more than once"
done
if [ -f "$root/LICENSE" ]; then
    notices=$(grep -c -i 'copyright' "$root/LICENSE")
    for file in dist/smtpd.hpp dist/smtpd.cpp dist/fixture.hpp; do
        [ "$(grep -c -i copyright $file)" -ge "$notices" ] || fail "$file lacks a notice of LICENSE"
    done
fi
grep -n '^#include <poll.h>' dist/smtpd.hpp && fail "the header includes <poll.h>, where AIX has macros for names such as events"
echo "ok: two files, no more, and the fixture"
# A second run over the same sources gives the same bytes.
"$root/tests/dist/amalgamate.sh" "$work/again" >/dev/null
cmp dist/smtpd.hpp again/smtpd.hpp && cmp dist/smtpd.cpp again/smtpd.cpp && cmp dist/fixture.hpp again/fixture.hpp || fail "two runs differ"

# $CXX may be several words.
$CXX $strict -O1 -Idist -c -o smtpd.o dist/smtpd.cpp || fail "warnings"
mkdir no_rtti
$CXX $strict -O0 -fno-rtti -Idist -c -o no_rtti/smtpd.o dist/smtpd.cpp || fail "warnings without RTTI"
$CXX $strict -O0 -fno-rtti -Idist -c -o no_rtti/main.o "$root/main.cpp" || fail "warnings in the program without RTTI"
$CXX -o no_rtti/smtpd no_rtti/smtpd.o no_rtti/main.o || fail "the program without RTTI"
no_rtti/smtpd --version >/dev/null || fail "the program without RTTI does not run"
echo "ok: no warnings, with RTTI and without"

# Two translation units, each including the header twice.
for unit in one two; do
    printf '#include "smtpd.hpp"\n#include "smtpd.hpp"\nconst void* %s() { return &asyncore::socket_map; }\n' $unit >$unit.cpp
    $CXX $strict -O0 -Idist -c -o $unit.o $unit.cpp || fail "the header, twice"
done
printf 'const void* one();\nconst void* two();\nint main() { return one() == two() ? 0 : 1; }\n' >main.cpp
$CXX -o units main.cpp one.o two.o smtpd.o || fail "two translation units"
./units || fail "two translation units see two maps"
echo "ok: two translation units"

# The fixture: in two translation units, without RTTI, and its own tests.
for unit in one two; do
    printf '#include "fixture.hpp"\n#include "fixture.hpp"\nint %s() { return mail_fixture().port(); }\n' $unit >$unit.cpp
    $CXX $strict -O0 -fno-rtti -Idist -c -o $unit.o $unit.cpp || fail "the fixture, twice"
done
printf 'int one();\nint two();\nint main() { return one() != two() ? 0 : 1; }\n' >main.cpp
$CXX -o units main.cpp one.o two.o no_rtti/smtpd.o -lpthread && ./units || fail "the fixture in two translation units"
cp "$root/tests/examples/fixture_test.cpp" .   # a copy: it shall see dist/fixture.hpp alone
$CXX $strict -O0 -Idist -o fixture_test fixture_test.cpp smtpd.o -lpthread && ./fixture_test || fail "the fixture's tests"
echo "ok: the fixture"

# The macros that the header adds to those of the headers it includes.
sed -n '/^ *# *include </p' dist/smtpd.hpp >system.hpp
$CXX -std=c++17 -dM -E -x c++ system.hpp | sort >before
$CXX -std=c++17 -dM -E -x c++ dist/smtpd.hpp | sort >after
[ "$(comm -13 before after | awk '{ print $2 }' | xargs)" = "ASYNCORE_HPP SMTPD_HPP" ] || {
    comm -13 before after
    fail "macros"
}

# What an object gives to the linker: names of our namespaces and what belongs to them (vtables, guards), and of
# the standard library's templates weak copies.
for part in asyncore smtpd; do
    $CXX -std=c++17 -O1 -I"$root" -c -o $part.part.o "$root/$part.cpp"
done
for object in smtpd.o no_rtti/smtpd.o asyncore.part.o smtpd.part.o; do
    nm -P -g $object | awk '
        $2 ~ /^[Uw]$/ { next }
        { weak = $2 ~ /^[VWu]$/; name = $1 }
        weak { sub(/^DW\.ref\./, "", name) }
        name ~ /^(__gxx_personality_v0|__clang_call_terminate)$/ && weak { next }
        { sub(/^_?_Z(GV|GR|T[VITSC]|Th[n0-9]+_|Tv[n0-9_]+)*Z?(N[KVRO]*)?/, "", name) }
        name ~ /^(8asyncore|8asynchat|5smtpd)/ { ours++; next }
        name ~ /^(S[tabsiod]|9__gnu_cxx|10__cxxabiv1|n[wa][jmy]Pv$|d[la]PvS_$)/ && weak { next }
        name ~ /^P?F.*(8asyncore|5smtpd)/ && weak { next }   # the type of a function, for a std::function
        { print; strange++ }
        END { if (strange || !ours) exit 1 }
    ' || fail "$object gives away these names"
done
echo "ok: nothing outside the namespaces, no macros"

# The core tests, which see nothing but the two files (an asyncore.hpp beside them stands for the real one), and the
# program, which they run.
echo '#include "smtpd.hpp"' >dist/asyncore.hpp
objects=$(find "${CORE_OBJECTS:-/nonexistent}" -name '*.o' 2>/dev/null || true)
{ [ -n "$objects" ] && echo tests/support.cpp || "$root/tests/dist/core_sources.sh"; echo main.cpp; } | sed "s|^|$root/|" |
    xargs -P "${JOBS:-2}" -n 1 sh -c '$0 -std=c++17 -O0 -Idist -c -o "core_$(basename "$1" .cpp).o" "$1"' "$CXX" ||
    fail "the core tests do not compile"
mv core_main.o program.o
$CXX -o smtpd program.o smtpd.o || fail "the program does not link"
[ -z "$objects" ] || rm core_support.o   # it is among those
$CXX -o core $(ls core_*.o 2>/dev/null) $objects smtpd.o -lpthread || fail "the core tests do not link"
(cd "$root" && SMTPD_PROGRAM=$work/smtpd "$work/core") || fail "the core tests"
echo "ok: the core tests, on two files"
