//! Bulk copies by the copy engine (9.7.9.25.4.1, cp.async.bulk): contiguous bytes, no tensor map.

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
