#!/bin/sh
# Expected: `div.u32 r, x, 32` with the 32 written in the PTX becomes a shift, `div.u32 r, x, 33` a multiply-high and
#   a shift, and `div.u32 r, 3300, 33` the number 100: ptxas is an optimising compiler that is given the literal,
#   and at the same -O3 it does turn `mul.lo.u32 r, x, 32` into a shift.
# Happens: each of the three divisions runs the whole sequence for an unknown divisor: integer to float, MUFU.RCP,
#   float to integer, and two corrections. The literal is an operand in it (`I2F.U32.RP R0, 0x20`).
# Seen: ptxas 13.0.88 and 13.5.37, sm_90a, -O3, the same from both:
#   x * 32: 0 MUFU.RCP, 7 instructions; x / 32: 1, 20; x / 33: 1, 20; 3300 / 33: 1, 20
# Why it matters: NVVM and LLVM strength-reduce divisions before PTX, so nobody sees this from CUDA C++. Whoever
#   writes PTX, or fills numbers of a shape into PTX text just before ptxas to specialise a kernel, pays for a
#   division that looks free, and must bring a multiplier and a shift along.
# Needs: python3 with venv and pip, about 500 MB of disk, a minute. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/kernels.ptx" <<'END'
.version 8.3
.target sm_90a
.address_size 64
END
kernel() { # name, the instruction that makes %r of %x
    cat >>"$dir/kernels.ptx" <<END
.visible .entry $1(.param .u64 out, .param .u32 in)
{
    .reg .u64 %out;
    .reg .u32 %x, %r;
    ld.param.u64 %out, [out];
    ld.param.u32 %x, [in];
    $2
    st.global.u32 [%out], %r;
    ret;
}
END
}
kernel mul_32 'mul.lo.u32 %r, %x, 32;'
kernel div_32 'div.u32 %r, %x, 32;'
kernel div_33 'div.u32 %r, %x, 33;'
kernel both_literal 'mov.u32 %x, 3300; div.u32 %r, %x, 33;'

changed=
for version in 13.0.88 13.5.37; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q --no-deps "nvidia-cuda-nvcc==$version" nvidia-cuda-nvdisasm==13.5.37
    bin=$(dirname "$(find "$dir/$version" -name ptxas)")
    "$bin/ptxas" -arch=sm_90a -O3 -o "$dir/kernels.cubin" "$dir/kernels.ptx"
    "$bin/nvdisasm" -c "$dir/kernels.cubin" >"$dir/kernels.sass"
    for kernel in mul_32 div_32 div_33 both_literal; do
        # The instructions of one kernel up to its EXIT; padding follows.
        sed -n "/^\.text\.$kernel:/,/EXIT/p" "$dir/kernels.sass" | grep '/\*[0-9a-f]*\*/' >"$dir/one.sass"
        reciprocals=$(grep -c 'MUFU\.RCP' "$dir/one.sass" || true)
        echo "ptxas $version, $kernel: $reciprocals MUFU.RCP, $(wc -l <"$dir/one.sass") instructions"
        case $kernel in mul_32) expected=0 ;; *) expected=1 ;; esac
        [ "$reciprocals" = "$expected" ] || changed="$changed $version/$kernel"
    done
done
if [ -n "$changed" ]; then
    echo "Changed: another number of reciprocals than the head of this script says in$changed." >&2
    exit 1
fi
