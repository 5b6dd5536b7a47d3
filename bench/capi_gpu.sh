#!/bin/sh
# Whether the C interface works on this machine's GPU, in half a minute: the examples, every misuse, many threads, and what only a real
# driver can tell (capi/tests/c/gpu.c). The GPU machine needs neither Rust nor a compiler, only these:
#
#     cargo build --release -p framestride-capi && cargo test -p framestride-capi --test programs    # anywhere
#     bench/capi_gpu.sh                      # $PROGRAMS: target/tmp; $LIBRARY: target/release
set -u
programs=${PROGRAMS:-target/tmp}
# It is looked for here before the folder that the programs were linked with.
LD_LIBRARY_PATH=${LIBRARY:-target/release}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
echo no >"$work/no.ptx"
echo no >"$work/no.json"
failed=0

# check NAME COMMAND...: runs it, and shows all that it printed only when it fails.
check() {
    name=$1
    shift
    if "$@" >"$work/log" 2>&1; then echo "ok      $name"; else echo "FAILED  $name"; failed=1; cat "$work/log"; fi
}

for device in gpu emulator; do
    check "one_layer $device" "$programs/one_layer" $device
    check "two_calls $device" "$programs/two_calls" $device
done
check "misuse" "$programs/misuse" "$work/no.ptx"
check "threads" "$programs/threads" 8
"$programs/gpu" || failed=1
if command -v compute-sanitizer >/dev/null; then
    for program in one_layer two_calls; do
        check "memcheck, $program" compute-sanitizer --error-exitcode 1 --tool memcheck "$programs/$program" gpu
    done
fi
exit $failed
