//! Asynchronous copies: by single threads (9.7.9.25.3, cp.async), and in bulk by the copy engine (9.7.9.25.4.1, cp.async.bulk:
//! contiguous bytes, no tensor map).

use super::barrier::Barrier;
use core::arch::asm;

/// Starts a copy of `bytes` from global memory to shared memory; it arrives as bytes on `barrier`.
///
/// # Safety
/// Both addresses and the size are multiples of 16 and valid; the shared memory is not touched until the barrier's phase is over.
#[inline(always)]
pub unsafe fn to_shared(to: u32, from: u64, bytes: u32, barrier: Barrier) {
    asm!(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
        in(reg32) to, in(reg64) from, in(reg32) bytes, in(reg32) barrier.address(), options(nostack)
    );
}

/// Starts a copy of 16 bytes from global memory, past L1, to shared memory.
///
/// # Safety
/// Both addresses are multiples of 16 and valid, and nobody writes the source during the launch; the shared memory is not touched
/// until this thread has come to [`wait_started`].
#[inline(always)]
pub unsafe fn start16(to: u32, from: u64) {
    asm!("cp.async.cg.shared.global [{}], [{}], 16;", in(reg32) to, in(reg64) from, options(nostack));
}

/// Waits until everything that this thread has started with [`start16`] is there, for this thread to see.
///
/// # Safety
/// Always sound; `unsafe` because reading what was copied rests on it.
#[inline(always)]
pub unsafe fn wait_started() {
    asm!("cp.async.wait_all;", options(nostack));
}
