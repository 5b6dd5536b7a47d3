#!/bin/sh
# Expected: a kernel with one `asm!("bar.sync 0;")` has one `bar.sync` in its PTX, as it has with `_syncthreads()`.
#   By 1.99 rustc cares for convergence on nvptx64: functions are `convergent` (rust-lang/rust#153995), and MIR jump
#   threading, which duplicates barriers in 1.96, is off there (rust-lang/rust#149637).
# Happens: inline asm is left out. Its call in the LLVM IR is not `convergent`, so LLVM moves the barrier into both
#   sides of a branch between lanes: two `bar.sync`, and each lane runs one of them. No option of `asm!` forbids it.
# Seen: rustc 1.99.1 (58cf8f9c3 2026-10-13) with its own core, opt and llc (and 1.101.0-nightly of 2026-10-28):
#   barriers in the PTX: _syncthreads 1, asm! 2, asm! marked convergent in the IR 1
# Why it matters: `bar.sync` is aligned: all threads of a warp must run the same one. So is wgmma, and `shfl.sync`
#   needs every lane that it names. Most of Hopper has no intrinsic in core and is asm in Rust. The source is right,
#   the PTX is not, and nothing says so. clang marks every inline asm of CUDA code convergent.
# Needs: rustup, about 1 GB of disk, 1 to 2 minutes. No GPU: nothing is launched.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
unset RUSTFLAGS CARGO_BUILD_TARGET || true
export RUSTUP_HOME="$dir/rustup" CARGO_TARGET_DIR="$dir/target" RUSTC_BOOTSTRAP=1
rustup -q toolchain install 1.99.1 --profile minimal -c rust-src -c llvm-tools --no-self-update

mkdir "$dir/src"
cat >"$dir/Cargo.toml" <<'END'
[package]
name = "barrier"
version = "0.0.0"
edition = "2024"
[profile.release]
panic = "abort"
codegen-units = 1
END
cat >"$dir/src/lib.rs" <<'END'
#![no_std]
#![feature(abi_ptx, stdarch_nvptx, asm_experimental_arch)]
use core::arch::{asm, nvptx::{_syncthreads, _thread_idx_x}};

#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn intrinsic(sums: *mut u32) {
    unsafe {
        let odd = _thread_idx_x() % 2 == 1;
        if odd {
            *sums.add(_thread_idx_x() as usize) += 1;
        }
        _syncthreads();
        if odd {
            *sums.add(_thread_idx_x() as usize - 1) += 1;
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn inline_asm(sums: *mut u32) {
    unsafe {
        let odd = _thread_idx_x() % 2 == 1;
        if odd {
            *sums.add(_thread_idx_x() as usize) += 1;
        }
        asm!("bar.sync 0;");
        if odd {
            *sums.add(_thread_idx_x() as usize - 1) += 1;
        }
    }
}
END
cd "$dir"
build() {
    cargo +1.99.1 rustc -q --release --target nvptx64-nvidia-cuda -Z build-std=core -- "$@"
}
barriers() { # the file and the kernel
    sed -n "/^\.visible \.entry $2(/,/^}/p" "$1" | grep -c 'bar\.sync' || true
}

build --emit=asm="$dir/rustc.ptx"
intrinsic=$(barriers rustc.ptx intrinsic)
inline=$(barriers rustc.ptx inline_asm)

# The same IR before any optimisation, with the attribute that rustc leaves out.
build --emit=llvm-ir="$dir/plain.ll" -C no-prepopulate-passes
sed '/ asm sideeffect /s/"()/"() convergent/' plain.ll >marked.ll
bin=$(dirname "$(find "$RUSTUP_HOME" -path '*/bin/opt')")
"$bin/opt" -O3 -S marked.ll -o optimised.ll
"$bin/llc" -O3 optimised.ll -o marked.ptx
marked=$(barriers marked.ptx inline_asm)

rustc +1.99.1 --version
echo "barriers in the PTX: _syncthreads $intrinsic, asm! $inline, asm! marked convergent in the IR $marked"
if [ "$intrinsic" != 1 ] || [ "$inline" != 2 ] || [ "$marked" != 1 ]; then
    echo "Changed: one barrier, two and one were expected." >&2
    exit 1
fi
