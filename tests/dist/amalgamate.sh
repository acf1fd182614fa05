#!/bin/sh
# Writes the library as two files, smtpd.hpp and smtpd.cpp, asyncore and asynchat inside, for copying into
# another project; and fixture.hpp, the mail server for its tests. Usage: amalgamate.sh [DIRECTORY], by default the `dist` beside the sources.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/dist}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root"

version=$(sed -n 's/.*version = "[^"]* version \([0-9.]*\)".*/\1/p' smtpd.hpp)
[ -n "$version" ] || { echo "amalgamate.sh: smtpd.hpp names no version" >&2; exit 1; }

# The commit, when the sources are a checkout of their own.
origin="version $version"
if [ "$(git rev-parse --show-toplevel 2>/dev/null)" = "$(pwd -P)" ] && commit=$(git rev-parse --short=12 HEAD 2>/dev/null)
then
    git diff --quiet HEAD -- asyncore.hpp asyncore.cpp smtpd.hpp smtpd.cpp tests/examples/fixture.hpp || commit="$commit, changed since"
    origin="$origin (commit $commit)"
fi

banner() {
    echo "// smtpd for C++17, $origin: $1"
    echo "// Made by tests/dist/amalgamate.sh from $2. Do not edit: change those."
    if [ -f LICENSE ]; then
        echo "//"
        sed -e 's|^|// |' -e 's| *$||' LICENSE
    fi
    echo
}

# merge SEEN FILE...: the files, one after the other. The system's headers come first, POSIX's before C++'s, each
# once and none that the file SEEN includes; includes of our own go; what stands inside a conditional (the include
# guard of a header aside) stays where it is.
merge() {
    seen=$1
    shift
    awk -v seen="$seen" '
        BEGIN { while (seen != "" && (getline line < seen) > 0) if (line ~ /^#include </) known[line] = 1 }
        FNR == 1 { depth = 0; guard = FILENAME ~ /hpp$/; body[++n] = "// ==== " FILENAME; body[++n] = ""; blank = 1 }
        /^ *# *if/ { depth++ }
        /^ *# *endif/ { depth-- }
        depth == guard && /^#include "/ { next }
        depth == guard && /^#include </ {
            name = $1 " " $2
            if (!(name in known)) { known[name] = 1; if (name ~ /\.h>$/) posix[name]; else standard[name] }
            next
        }
        /^$/ && blank { next }
        { blank = /^$/; body[++n] = $0 }
        # Prints the names in order, and a blank line after them; takes them out of the set.
        function print_sorted(names,    name, first) {
            for (;;) {
                first = ""
                for (name in names) if (first == "" || name < first) first = name
                print first
                if (first == "") return
                delete names[first]
            }
        }
        END {
            print_sorted(posix)
            print_sorted(standard)
            for (i = 1; i <= n; i++) print body[i]
        }
    ' "$@"
}

{
    banner "the declarations" "asyncore.hpp and smtpd.hpp"
    merge "" asyncore.hpp smtpd.hpp
} > "$out/smtpd.hpp.new"
{
    banner "the definitions" "asyncore.cpp and smtpd.cpp"
    echo '#include "smtpd.hpp"'
    echo
    merge "$out/smtpd.hpp.new" asyncore.cpp smtpd.cpp
} > "$out/smtpd.cpp.new"
{
    banner "a mail server for tests" "tests/examples/fixture.hpp"
    cat tests/examples/fixture.hpp
} > "$out/fixture.hpp.new"
mv "$out/fixture.hpp.new" "$out/fixture.hpp"
mv "$out/smtpd.hpp.new" "$out/smtpd.hpp"
mv "$out/smtpd.cpp.new" "$out/smtpd.cpp"
echo "$out/smtpd.hpp, $out/smtpd.cpp and $out/fixture.hpp, $origin"
