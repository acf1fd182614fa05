#!/bin/sh
# Fuzzes all targets at once, until each has had about 30 seconds of a core. Exit status: see run.sh.
cores=$(getconf _NPROCESSORS_ONLN)
seconds=$((30 * 5 / (cores < 5 ? cores : 5)))
exec sh "$(dirname "$0")/run.sh" -t $seconds -j 5 "$@"
