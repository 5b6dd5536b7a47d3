//! mbarriers in shared memory (9.7.13.15): eight bytes that count arrivals, and bytes of
//! asynchronous copies, in phases.
//!
//! A phase completes when all expected arrivals and all expected bytes have come. Those who wait
//! name the phase by its parity.

use super::{shared, warp};
use core::arch::asm;
use framestride_shapes::shared::Barriers;

/// A barrier in the block's shared memory.
#[derive(Clone, Copy)]
pub struct Barrier(u32);

impl Barrier {
    /// Barrier `index` of several that lie beside each other.
    #[inline(always)]
    pub fn at(barriers: Barriers, index: u32) -> Barrier {
        Barrier(shared::base() + barriers.at(index))
    }

    /// Its address in shared memory.
    #[inline(always)]
    pub fn address(self) -> u32 {
        self.0
    }

    /// Sets the barrier up. Each phase takes `arrivals` arrivals.
    ///
    /// # Safety
    /// One thread does it, before any use. [`publish_initialised`] and a barrier of the block
    /// follow.
    #[inline(always)]
    pub unsafe fn init(self, arrivals: u32) {
        asm!("mbarrier.init.shared::cta.b64 [{}], {};", in(reg32) self.0, in(reg32) arrivals, options(nostack));
    }

    /// Arrives.
    ///
    /// # Safety
    /// The arrival is one of those that the phase counts.
    #[inline(always)]
    pub unsafe fn arrive(self) {
        asm!("mbarrier.arrive.shared::cta.b64 _, [{}];", in(reg32) self.0, options(nostack));
    }

    /// Says that this warp is done with what the barrier guards: its first lane arrives.
    ///
    /// # Safety
    /// As for [`Barrier::arrive`]. All lanes are done, and come here.
    #[inline(always)]
    pub unsafe fn release(self, lane: u32) {
        if lane == 0 {
            self.arrive();
        }
    }

    /// Arrives, and makes the phase wait for `bytes` more bytes of copies.
    ///
    /// # Safety
    /// As for [`Barrier::arrive`]. Copies of exactly that many bytes are issued on this barrier.
    #[inline(always)]
    pub unsafe fn arrive_expecting(self, bytes: u32) {
        asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{}], {};", in(reg32) self.0, in(reg32) bytes, options(nostack));
    }

    /// Waits until the phase of this parity has completed.
    ///
    /// # Safety
    /// The phase will complete, because somebody else arrives.
    #[inline(always)]
    // The label is local to the braces, which PTX takes for its scope. Numeric labels are not PTX.
    #[allow(named_asm_labels)]
    pub unsafe fn wait(self, parity: u32) {
        asm!(
            "{{",
            ".reg .pred %done;",
            "again:",
            "mbarrier.try_wait.parity.shared::cta.b64 %done, [{}], {};",
            "@!%done bra again;",
            "}}",
            in(reg32) self.0, in(reg32) parity, options(nostack)
        );
    }
}

/// A position in a ring of stages, and the parity of its current round.
#[derive(Clone, Copy)]
pub struct Slot {
    /// Stage of the ring.
    pub stage: u32,
    /// The parity of the phases that this round waits for, of the stage's barriers.
    pub parity: u32,
}

impl Slot {
    /// The first stage, for those who wait until it is full.
    pub const FIRST_FULL: Slot = Slot { stage: 0, parity: 0 };
    /// The first stage, for those who wait until it is free. Nobody has used it, so its phase of
    /// parity 1 is over.
    pub const FIRST_FREE: Slot = Slot { stage: 0, parity: 1 };

    /// The slot of use `number` (from 0) of a ring of `stages` stages, for those who wait until it
    /// is full.
    #[inline(always)]
    pub fn full(number: u32, stages: u32) -> Slot {
        Slot { stage: number % stages, parity: number / stages % 2 }
    }

    /// The same slot, in registers of which ptxas sees that all lanes have the same
    /// ([`warp::uniform`]).
    ///
    /// # Safety
    /// All 32 lanes come here with one slot.
    #[inline(always)]
    pub unsafe fn uniform(self) -> Slot {
        Slot { stage: warp::uniform(self.stage), parity: warp::uniform(self.parity) }
    }

    /// The slot after this one, in a ring of `stages` stages.
    #[inline(always)]
    pub fn next(self, stages: u32) -> Slot {
        if self.stage + 1 == stages {
            Slot { stage: 0, parity: self.parity ^ 1 }
        } else {
            Slot { stage: self.stage + 1, parity: self.parity }
        }
    }
}

/// Makes initialised barriers visible to the copy engine (9.7.13.5, fence.mbarrier_init).
///
/// # Safety
/// The thread that initialised them calls this, and a barrier of the block follows.
#[inline(always)]
pub unsafe fn publish_initialised() {
    asm!("fence.mbarrier_init.release.cluster;", options(nostack));
    shared::publish_to_async();
}
