//! Asynchronous copies. Single threads make small ones (9.7.9.25.3, cp.async), and the copy engine
//! makes large ones (9.7.9.25.4.1, cp.async.bulk: contiguous bytes, no tensor map).

use super::barrier::Barrier;
use core::arch::asm;

/// Starts a copy of `bytes` bytes from global to shared memory. They arrive on `barrier`.
///
/// # Safety
/// Both addresses and the size are valid and multiples of 16. Nobody touches the shared memory
/// until the barrier's phase is over.
#[inline(always)]
pub unsafe fn to_shared(to: u32, from: u64, bytes: u32, barrier: Barrier) {
    asm!(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [{}], {}, [{}];",
        in(reg32) to, in(reg64) from, in(reg32) bytes, in(reg32) barrier.address(), options(nostack)
    );
}

/// Starts a copy of 16 bytes from global to shared memory, past L1.
///
/// # Safety
/// Both addresses are valid multiples of 16, and nobody writes the source during the launch. Nobody
/// touches the shared memory until this thread has come to [`wait_started`].
#[inline(always)]
pub unsafe fn start16(to: u32, from: u64) {
    asm!("cp.async.cg.shared.global [{}], [{}], 16;", in(reg32) to, in(reg64) from, options(nostack));
}

/// The same, `OFFSET` bytes behind both addresses. ptxas adds it in the instruction where it is from
/// -2048 to 2047.
///
/// # Safety
/// As for [`start16`].
#[inline(always)]
pub unsafe fn start16_at<const OFFSET: i32>(to: u32, from: u64) {
    asm!(
        "cp.async.cg.shared.global [{to} + {offset}], [{from} + {offset}], 16;",
        to = in(reg32) to, from = in(reg64) from, offset = const OFFSET, options(nostack)
    );
}

/// Makes a group of all that this thread has started since its last group. It may be empty.
///
/// # Safety
/// This is always sound. It is `unsafe` because the waits for groups count on it.
#[inline(always)]
pub unsafe fn commit_group() {
    asm!("cp.async.commit_group;", options(nostack));
}

/// Waits until at most `PENDING` of this thread's groups are in flight. This thread may read what
/// the others have brought, and behind a barrier all may.
///
/// # Safety
/// As for [`wait_started`].
#[inline(always)]
pub unsafe fn wait_groups<const PENDING: u32>() {
    asm!("cp.async.wait_group {};", const PENDING, options(nostack));
}

/// Waits until everything is there that this thread has started with [`start16`]. This thread may
/// read it then.
///
/// # Safety
/// This is always sound. It is `unsafe` because reading what was copied rests on it.
#[inline(always)]
pub unsafe fn wait_started() {
    asm!("cp.async.wait_all;", options(nostack));
}
