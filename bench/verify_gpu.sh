#!/usr/bin/env bash
# Whether the kernels are right on this machine's GPU: `framestride verify` of every shipped spec at full size (1 to 2 minutes each for
# the large ones), then compute-sanitizer's three tools on the small ones (half a minute each), where it is installed.
#
#     bench/verify_gpu.sh [SPEC ...]        # $FRAMESTRIDE: the command; $DEVICE: gpu, or emulator for a rehearsal with small specs;
#                                           # $FAMILY: of the kernels, such as sm_80; $HEADS: so many heads for every
#                                           # spec but the tiny ones, $JOBS specs at a time (4), which takes some minutes in all
set -u
framestride=${FRAMESTRIDE:-target/release/framestride}
device=${DEVICE:-gpu}
models=$(dirname "$0")/../shapes/models
family=${FAMILY:+--family $FAMILY}
small="tiny_plain tiny_text_last tiny_layer_half tiny_text_rope tiny_heads_sinks"
# 8 bits are for Hopper alone.
[ -n "${FAMILY:-}" ] || small="tiny_e4m3 $small"
if [ $# -eq 0 ]; then
    large=$(cd "$models" && ls ./*.toml | sed 's|^\./||; s|\.toml$||' | grep -v '^tiny_')
    set -- $small $large
fi
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT

# check NAME COMMAND...: runs it, and shows what it printed only when it fails, which it notes in a file.
check() {
    name=$1
    shift
    log=$(mktemp -p "$folder")
    start=$(date +%s)
    if "$@" >"$log" 2>&1; then verdict=ok; else verdict=FAILED; touch "$folder/failed"; fi
    printf '%-6s %4s s  %s\n' "$verdict" "$(($(date +%s) - start))" "$name"
    if [ $verdict = FAILED ]; then grep -v '^  ok' "$log"; fi
}

for spec in "$@"; do
    if [ -n "${HEADS:-}" ] && [ "${spec#tiny_}" = "$spec" ]; then
        name=$(basename "$spec" .toml)
        [ -f "$spec" ] || spec=$models/$spec.toml
        sed "s/^heads = .*/heads = $HEADS/; s/^name = \"\(.*\)\"/name = \"\1_heads_$HEADS\"/" "$spec" >"$folder/$name.toml"
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-4}" ]; do wait -n; done
        check "verify $name with $HEADS heads" "$framestride" verify "$folder/$name.toml" --device "$device" $family &
    else
        check "verify $spec" "$framestride" verify "$spec" --device "$device" $family
    fi
done
wait
if [ "$device" = gpu ] && command -v compute-sanitizer >/dev/null; then
    for spec in "$@"; do
        case " $small " in *" $spec "*) ;; *) continue ;; esac
        for tool in memcheck racecheck synccheck; do
            check "$tool, verify $spec" compute-sanitizer --error-exitcode 1 --tool $tool "$framestride" verify "$spec" --device gpu $family
        done
    done
fi
[ ! -e "$folder/failed" ]
