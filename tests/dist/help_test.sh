#!/bin/sh
# The options and classes of `smtpd --help`, of the man page, of README's table and of the completions are the same.
# Usage: help_test.sh PROGRAM. Without mandoc the man page is compared all the same, only not checked. The completions
# are run in their shells, those that are here. With NO_SKIP a tool that is missing is a failure.
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

present() {
    command -v "$1" >/dev/null && return
    [ -z "${NO_SKIP:-}" ] || { echo "FAILED: there is no $1"; exit 1; }
    echo "skipped: there is no $1"
    return 1
}

# What the shells offer. In bash an option takes a value when no option is offered behind it.
completions=$root/tests/dist/completions
awk '{ value = sub(/ \.\.\.$/, "") ? " ..." : ""; n = split($0, name, ", "); while (n) print name[n--] value }' "$work/of-help" |
    sort >"$work/names"
if present bash; then
    cat >"$work/ask" <<'END'
. "$1"
ask() { COMP_WORDS=(smtpd "$@") COMP_CWORD=$#; _smtpd; }
ask -
for name in "${COMPREPLY[@]}"; do
    ask "$name" -
    if [[ ${COMPREPLY-} ]]; then printf '%s\n' "$name"; else printf '%s ...\n' "$name"; fi
done
exec >"$2"
ask --class ''; printf '%s\n' "${COMPREPLY[@]}"
ask --class = ''; printf '%s\n' "${COMPREPLY[@]}" >&2
END
    bash "$work/ask" "$completions/smtpd.bash" "$work/unsorted" 2>"$work/after-equals" | sort >"$work/of-bash"
    same "$work/names" "$work/of-bash" "the options of --help and in bash"
    sort "$work/unsorted" >"$work/classes-of-bash"
    same "$work/classes" "$work/classes-of-bash" "the classes of --help and in bash"
    same "$work/unsorted" "$work/after-equals" "the classes after --class and --class= in bash"
fi
if present zsh; then
    zsh -fc '_arguments() { print -rl -- "$@" }; . "$1"' zsh "$completions/_smtpd" >"$work/zsh"
    sed -n 's/^\(([^)]*)\)\{0,1\}\(-[^[]*\)\[[^]]*\]/\2/p' "$work/zsh" | sed 's/=\{0,1\}:.*/ .../' | sort >"$work/of-zsh"
    same "$work/names" "$work/of-zsh" "the options of --help and in zsh"
    sed -n 's/.*--class=.*:(\(.*\))/\1/p' "$work/zsh" | tr ' ' '\n' | sort >"$work/classes-of-zsh"
    same "$work/classes" "$work/classes-of-zsh" "the classes of --help and in zsh"
fi
if present fish; then   # which offers options behind `-c -`, too
    awk '{ value = / -x / ? " ..." : ""
           for (i = 1; i < NF; i++) if ($i ~ /^-[sl]$/) print substr("--", 1, $i == "-l" ? 2 : 1) $(i + 1) value }' \
        "$completions/smtpd.fish" | sort >"$work/of-fish"
    same "$work/names" "$work/of-fish" "the options of --help and in fish"
    fish --no-config -c 'source $argv; complete -C "smtpd -c "' "$completions/smtpd.fish" | cut -f 1 | sort >"$work/classes-of-fish"
    same "$work/classes" "$work/classes-of-fish" "the classes of --help and in fish"
fi

if present mandoc; then
    mandoc -T lint "$page" || { echo "FAILED: mandoc complains"; exit 1; }
    echo "ok: mandoc accepts the man page"
fi
