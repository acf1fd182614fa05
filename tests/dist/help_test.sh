#!/bin/sh
# The options and classes of `smtpd --help`, of the man page and of README's table are the same.
# Usage: help_test.sh PROGRAM. Without mandoc the man page is compared all the same, only not checked.
set -eu

program=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
page=$root/tests/dist/smtpd.1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

same() {
    if diff "$1" "$2" >"$work/diff"; then
        echo "ok: $3"
    else
        echo "FAILED: $3; < in the first, > in the second"
        cat "$work/diff"
        exit 1
    fi
}

# One line for an option: its names, and `...` when it takes a value.
"$program" --help >"$work/help" 2>&1
sed -n 's/^ \{4\}\(-.*\)/\1/p' "$work/help" | sed 's/ [A-Z].*/ .../' | sort >"$work/of-help"
sed -n 's/^\.It Fl \(.*\)/-\1/p' "$page" | sed -e 's/ Ar .*/ .../' -e 's/ , Fl /, -/g' | sort >"$work/of-page"
[ -s "$work/of-help" ] || { echo "FAILED: --help names no options"; exit 1; }
same "$work/of-help" "$work/of-page" "the options of --help and of the man page"

if [ -f "$root/README.md" ] && grep -q '^| `-n`' "$root/README.md"; then
    sed -n 's/^| \(`-[^|]*\)|.*/\1/p' "$root/README.md" | tr ';' '\n' |
        sed -e 's/`//g' -e 's/^ *//' -e 's/ *$//' -e 's/ [A-Z].*/ .../' | sort >"$work/of-readme"
    same "$work/of-help" "$work/of-readme" "the options of --help and of README"
fi

# The classes: --help lists those that there are.
sed -n 's/.*do with the messages: \(.*\)\./\1/p' "$work/help" | tr -d ' ' | tr ',' '\n' | sort >"$work/classes"
sed -n 's/^\.It Cm //p' "$page" | sort >"$work/classes-of-page"
same "$work/classes" "$work/classes-of-page" "the classes of --help and of the man page"

# The defaults.
for value in $(grep -o -E '[0-9]{8}|(localhost|127\.0\.0\.1):[0-9]+|/var/[a-z0-9/]+' "$work/help" | sort -u); do
    grep -q -F "$value" "$page" || { echo "FAILED: the man page does not name $value"; exit 1; }
done

if command -v mandoc >/dev/null; then
    mandoc -T lint "$page" || { echo "FAILED: mandoc complains"; exit 1; }
    echo "ok: mandoc accepts the man page"
elif [ "${NO_SKIP:-}" ]; then
    echo "FAILED: there is no mandoc"
    exit 1
fi
