#!/bin/sh
# Expected: tensor cores, FMA units and the unit for integers are separate, and a scheduler issues one instruction a cycle. mma.sync of
#   m16n8k16 keeps the tensor core of a scheduler busy for 6 cycles, so five other instructions that depend on none of them should cost no time.
# Happens: on a Hopper every f32 addition, multiplication or fma costs the tensor core 1.2 to 1.3 cycles. They alone take no more than 1.04, so
#   hardly any of them is hidden. A third of an ldmatrix costs 1.5. Logic on integers is nearly hidden.
# Seen: an H200 with driver 580.159.04, ptxas 13.0.88. Cycles of a scheduler with two warps for each mma.sync:
#   products alone: 6.02
#   and one add.f32: 7.33
#   and two add.f32: 8.35
#   and two fma.f32: 8.37
#   and two xor.b32: 6.53
#   and a third of an ldmatrix: 7.51
#   two add.f32 alone: 2.08
# Why it matters: attention with mma.sync (FlashAttention-2, and everything for Ampere that runs on a Hopper) adds one weight to a sum for every
#   two to four products. Its time is about the sum of what both units need, not the larger of the two. So what helps is fewer instructions
#   beside the products, and not to move them under the products.
# Needs: an H100 or H200 with a driver for CUDA 13, python3 with venv and pip, a minute. PTXAS may name a ptxas 13.0; then nothing is
#   installed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if [ -z "${PTXAS:-}" ]; then
    python3 -m venv "$dir/venv"
    "$dir/venv/bin/python" -m pip install -q --no-compile nvidia-cuda-nvcc==13.0.88
    PTXAS=$(find "$dir/venv" -name ptxas -path '*bin*' | head -n 1)
fi
export PTXAS
cat >"$dir/finding.py" <<'PYTHON'
import ctypes
import os
import pathlib
import subprocess
import sys

PRODUCTS, ROUNDS, WARPS = 48, 1000, 8
REGISTERS = 16
OTHERS = {
    "add.f32": "add.ftz.f32 %x{0}, %x{0}, %y;",
    "fma.f32": "fma.rn.ftz.f32 %x{0}, %x{0}, %y, %y;",
    "xor.b32": "xor.b32 %u{0}, %u{0}, %v;",
    "ldmatrix": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%b{1}, %b{2}, %b{3}, %b{4}}}, [%shared + {5}];",
}


def product(index):
    d = ", ".join(f"%d{index % REGISTERS * 4 + part}" for part in range(4))
    b = index // 3 % 2 * 4 + index % 2 * 2
    return (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        f"{{{d}}}, {{%a0, %a1, %a2, %a3}}, {{%b{b}, %b{b + 1}}}, {{{d}}};"
    )


def loop(name, every, count, products=True):
    """`count` other instructions behind every so many products. All chains of dependences are long."""
    lines, done = [], 0
    for index in range(PRODUCTS):
        if index % every == 0:
            for _ in range(count):
                first = done % 2 * 4
                lines.append(OTHERS[name].format(done % REGISTERS, *range(first, first + 4), done % 16 * 512))
                done += 1
        if products:
            lines.append(product(index))
    return lines


def kernel(entry, body):
    accumulators = range(4 * REGISTERS)
    zero = [f"cvt.rn.f32.u32 %d{i}, %v;" for i in accumulators]
    zero += [f"cvt.rn.f32.u32 %x{i}, %thread;\nadd.u32 %u{i}, %thread, {i};" for i in range(REGISTERS)]
    zero += [f"mov.b32 %a{i}, %v;" for i in range(4)] + [f"mov.b32 %b{i}, %v;" for i in range(8)]
    total = [f"add.f32 %y, %y, %d{i};" for i in accumulators]
    total += [f"add.f32 %y, %y, %x{i};\ncvt.rn.f32.u32 %z, %u{i};\nadd.f32 %y, %y, %z;" for i in range(REGISTERS)]
    total += [f"cvt.rn.f32.u32 %z, %b{i};\nadd.f32 %y, %y, %z;" for i in range(8)]
    new = "\n"
    return f"""
.visible .entry {entry}(.param .u64 cycles, .param .u64 sums, .param .u32 zero) .reqntid {32 * WARPS}
{{
.reg .f32 %d<64>, %x<16>, %y, %z; .reg .b32 %u<16>, %a<4>, %b<8>, %v, %thread, %lane, %shared, %round; .reg .b64 %to, %start, %end; .reg .pred %more;
.shared .align 1024 .b8 tile[16384];
mov.u32 %thread, %tid.x; ld.param.u32 %v, [zero]; cvt.rn.f32.u32 %y, %v; mov.u32 %shared, tile;
and.b32 %lane, %thread, 31; mad.lo.u32 %shared, %lane, 16, %shared; add.u32 %v, %v, 0;
{new.join(zero)}
bar.sync 0;
mov.u64 %start, %clock64; mov.u32 %round, 0;
again:
{new.join(body)}
add.u32 %round, %round, 1; setp.lt.u32 %more, %round, {ROUNDS}; @%more bra again;
mov.u64 %end, %clock64; sub.u64 %end, %end, %start;
{new.join(total)}
ld.param.u64 %to, [cycles]; mad.wide.u32 %to, %thread, 8, %to; st.global.u64 [%to], %end;
ld.param.u64 %to, [sums]; mad.wide.u32 %to, %thread, 4, %to; st.global.f32 [%to], %y;
ret;
}}
"""


KERNELS = {
    "products alone": loop("add.f32", 1, 0),
    "and one add.f32": loop("add.f32", 1, 1),
    "and two add.f32": loop("add.f32", 1, 2),
    "and two fma.f32": loop("fma.f32", 1, 2),
    "and two xor.b32": loop("xor.b32", 1, 2),
    "and a third of an ldmatrix": loop("ldmatrix", 3, 1),
    "two add.f32 alone": loop("add.f32", 1, 2, products=False),
}


def cubin(folder):
    version = subprocess.run([os.environ["PTXAS"], "--version"], capture_output=True, text=True, check=True).stdout
    if "release 13.0" not in version:
        sys.exit(f"ptxas is another one than 13.0:\n{version}")
    ptx, out = folder / "kernels.ptx", folder / "kernels.cubin"
    entries = [kernel(f"k{index}", body) for index, body in enumerate(KERNELS.values())]
    ptx.write_text(".version 8.0\n.target sm_80\n.address_size 64\n" + "".join(entries))
    subprocess.run([os.environ["PTXAS"], "-arch=sm_90", "-o", out, ptx], check=True)
    return out.read_bytes()


def measured(image):
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        if (status := getattr(cuda, name)(*arguments)) != 0:
            sys.exit(f"{name} returned {status}")

    device, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    major = ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(major), 75, device)
    if major.value != 9:
        sys.exit("there is no Hopper GPU")
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), image)
    cycles, sums, zero = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint32(0)
    for pointer in (cycles, sums):
        call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(8 * 32 * WARPS))
    found = {}
    for index, name in enumerate(KERNELS):
        function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), module, f"k{index}".encode())
        pointers = (ctypes.c_void_p * 3)(*(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in (cycles, sums, zero)))
        for _ in range(2):
            call("cuLaunchKernel", function, 1, 1, 1, 32 * WARPS, 1, 1, 0, None, pointers, None)
            call("cuCtxSynchronize")
        host = (ctypes.c_uint64 * (32 * WARPS))()
        call("cuMemcpyDtoH_v2", host, cycles, ctypes.c_size_t(ctypes.sizeof(host)))
        # A scheduler has two of the eight warps.
        found[name] = max(host) / ROUNDS / (2 * PRODUCTS)
    return found


found = measured(cubin(pathlib.Path(sys.argv[1])))
for name, cycles in found.items():
    print(f"{name}: {cycles:.2f}")
alone = found["products alone"]
more = {name: cycles - alone for name, cycles in found.items()}
as_seen = (
    5.5 < alone < 6.8
    and more["and one add.f32"] > 1.0
    and more["and two add.f32"] > 2.2
    and more["and two fma.f32"] > 2.2
    and more["and two xor.b32"] < 1.2
    and more["and a third of an ldmatrix"] > 0.5
    and found["two add.f32 alone"] < 2.8
)
if not as_seen:
    sys.exit("something has changed")
PYTHON
python3 "$dir/finding.py" "$dir"
