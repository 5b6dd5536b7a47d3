#!/bin/sh
# Whether the kernels are right on this machine's GPU: `framestride verify` of every shipped spec at full size (1 to 2 minutes each for
# the large ones), then compute-sanitizer's three tools on the small ones (half a minute each), where it is installed.
#
#     bench/verify_gpu.sh [SPEC ...]        # $FRAMESTRIDE: the command; $DEVICE: gpu, or emulator for a rehearsal with small specs;
#                                           # $FAMILY: of the kernels, such as sm_80
set -u
framestride=${FRAMESTRIDE:-target/release/framestride}
device=${DEVICE:-gpu}
family=${FAMILY:+--family $FAMILY}
small="tiny_plain tiny_text_last tiny_layer_half tiny_text_rope tiny_heads_sinks"
# 8 bits are for Hopper alone.
[ -n "${FAMILY:-}" ] || small="tiny_e4m3 $small"
if [ $# -eq 0 ]; then
    large=$(cd "$(dirname "$0")/../shapes/models" && ls ./*.toml | sed 's|^\./||; s|\.toml$||' | grep -v '^tiny_')
    set -- $small $large
fi
log=$(mktemp) || exit 2
trap 'rm -f "$log"' EXIT
failed=0

# check NAME COMMAND...: runs it, and shows what it printed only when it fails.
check() {
    name=$1
    shift
    start=$(date +%s)
    if "$@" >"$log" 2>&1; then verdict=ok; else verdict=FAILED; failed=1; fi
    printf '%-6s %4s s  %s\n' "$verdict" "$(($(date +%s) - start))" "$name"
    if [ $verdict = FAILED ]; then grep -v '^  ok' "$log"; fi
}

for spec in "$@"; do
    check "verify $spec" "$framestride" verify "$spec" --device "$device" $family
done
if [ "$device" = gpu ] && command -v compute-sanitizer >/dev/null; then
    for spec in "$@"; do
        case " $small " in *" $spec "*) ;; *) continue ;; esac
        for tool in memcheck racecheck synccheck; do
            check "$tool, verify $spec" compute-sanitizer --error-exitcode 1 --tool $tool "$framestride" verify "$spec" --device gpu $family
        done
    done
fi
exit $failed
