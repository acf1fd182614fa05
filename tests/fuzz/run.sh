#!/bin/sh
# Builds the fuzz targets with libFuzzer and the sanitizers, and runs them from the corpus here and from seeds made of
# tests/reference. Usage: run.sh [-t SECONDS] [-j JOBS] [--minimise] [TARGET...]
#
# -t SECONDS   how long each target runs (60)
# -j JOBS      how many run at once (as many as there are cores)
# --minimise   instead of running: makes the corpus here anew, of what there is in BUILD/corpus, here and in the seeds:
#              at most KEEP (300) inputs a target
#
# BUILD is the folder to build in; new inputs are kept in BUILD/corpus/TARGET, those that a target fails on in
# BUILD/artifacts/TARGET. Without it a temporary folder is used, which stays when a target fails. CXX may be a clang++
# that has libFuzzer. Exit status: 0; 1 when a target fails; 77 when there is no such clang++, or 1 when NO_SKIP=1.
set -u

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
warnings='-Wall -Wextra -Wpedantic -Wshadow -Wconversion'
flags='-std=c++17 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all'
options="-max_len=4096 -timeout=20 -rss_limit_mb=2000 -entropic=0 -dict=$here/smtp.dict -print_final_stats=1"
ASAN_OPTIONS=${ASAN_OPTIONS-quarantine_size_mb=64}
PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS PYTHONDONTWRITEBYTECODE

usage() {
    sed -n '3,8s/^# \{0,1\}//p' "$0" >&2
    exit 1
}

# Runs a target, and prints a line of figures; or what it says when it fails.
run() {
    target=$1
    "$BUILD/$target" $options -max_total_time="$seconds" -artifact_prefix="$BUILD/artifacts/$target/" \
        "$BUILD/corpus/$target" "$here/corpus/$target" "$BUILD/seeds/$target" >"$BUILD/$target.log" 2>&1
    status=$?
    if [ $status -ne 0 ]; then
        grep -v -E '^#[0-9]+|^(INFO|MS|Dictionary|stat::)|NEW_FUNC' "$BUILD/$target.log" | head -40
        echo "FAILED: $target. To see it again: $BUILD/$target FILE; as base64, FILE is"
        for file in "$BUILD/artifacts/$target"/*; do
            [ ! -e "$file" ] || { echo "$file:"; base64 "$file"; }
        done
        return 1
    fi
    awk -v target="$target" '
        /^#[0-9]+/ { for (i = 1; i < NF; ++i) { if ($i == "cov:") edges = $(i + 1); if ($i == "corp:") inputs = $(i + 1) } }
        /^stat::number_of_executed_units/ { executions = $2 }
        /^stat::average_exec_per_sec/ { speed = $2 }
        END {
            sub("/.*", "", inputs)
            printf "%-13s %9d executions, %6d a second; %5d edges; %5d inputs\n", target, executions, speed, edges, inputs
        }' "$BUILD/$target.log"
}

# Makes the corpus of a target anew: small inputs that reach every edge, then those that go there more often.
minimise() {
    target=$1 new=$BUILD/minimised/$1
    rm -rf "$new" && mkdir -p "$new/edges" "$new/counts" "$new/corpus" || return 1
    for how in '-merge=1 -use_counters=0 edges' '-set_cover_merge=1 counts'; do
        if ! "$BUILD/$target" $options -artifact_prefix="$new/" ${how% *} "$new/${how##* }" \
            "$here/corpus/$target" "$BUILD/corpus/$target" "$BUILD/seeds/$target" >"$BUILD/$target.log" 2>&1; then
            tail -20 "$BUILD/$target.log"
            return 1
        fi
    done
    { ls "$new/edges" | sed 's,^,edges/,'; ls -Sr "$new/counts" | sed 's,^,counts/,'; } | head -n "${KEEP:-300}" |
        while read -r name; do cp "$new/$name" "$new/corpus/$(basename "$name" | cut -c 1-12)" || exit 1; done
    rm -rf "${here:?}/corpus/$target" && mv "$new/corpus" "$here/corpus/$target" || return 1
    echo "$target: $(ls "$here/corpus/$target" | wc -l) inputs, $(cat "$here/corpus/$target"/* | wc -c) bytes"
}

seconds=60 jobs=$(getconf _NPROCESSORS_ONLN) action=run targets=
while [ $# -gt 0 ]; do
    case $1 in
    -t) seconds=${2:?} && shift ;;
    -j) jobs=${2:?} && shift ;;
    --minimise) action=minimise ;;
    --built) $action "$2"; exit ;;   # how this script calls itself
    fuzz_*) [ -e "$here/$1.cpp" ] || usage; targets="$targets $1" ;;
    *) usage ;;
    esac
    shift
done
[ -n "$targets" ] || targets='fuzz_channel fuzz_reply fuzz_grammar fuzz_proxy fuzz_address'

temporary=
[ -n "${BUILD:-}" ] || { temporary=1 BUILD=$(mktemp -d); } || exit 1
mkdir -p "$BUILD" && BUILD=$(cd "$BUILD" && pwd) || exit 1
export BUILD

echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >"$BUILD/probe.cpp"
for cxx in "${CXX:-}" clang++ clang++-14 ''; do
    [ -n "$cxx" ] && $cxx $flags -o "$BUILD/probe" "$BUILD/probe.cpp" 2>/dev/null && break
done
if [ -z "$cxx" ]; then
    echo "skipped: there is no clang++ with libFuzzer"
    [ -z "$temporary" ] || rm -rf "$BUILD"
    [ "${NO_SKIP:-}" = 1 ] && exit 1
    exit 77
fi

{
    for name in asyncore smtpd; do echo "-o $BUILD/$name.o $root/$name.cpp"; done
    for target in $targets; do
        echo "-o $BUILD/$target.o $here/$target.cpp"
        echo "-o $BUILD/$target.main.o -DFUZZ_TARGET=$target $here/fuzz_main.cpp"
    done
} | xargs -P "$jobs" -I{} sh -c "$cxx $flags $warnings -I$root -c {}" || exit 1
for target in $targets; do
    $cxx $flags -o "$BUILD/$target" "$BUILD/$target.o" "$BUILD/$target.main.o" "$BUILD/asyncore.o" "$BUILD/smtpd.o" || exit 1
    mkdir -p "$here/corpus/$target" "$BUILD/corpus/$target" "$BUILD/seeds/$target"
    rm -rf "$BUILD/artifacts/$target" && mkdir -p "$BUILD/artifacts/$target"
done
python3 "$here/seeds.py" "$BUILD/seeds" || echo "note: without python3 there are no seeds"

[ $action = minimise ] && set -- --minimise || set -- -t "$seconds"
echo "$targets" | tr ' ' '\n' | grep . | xargs -P "$jobs" -I{} sh "$here/run.sh" "$@" --built {} || exit 1
[ -z "$temporary" ] || rm -rf "$BUILD"
