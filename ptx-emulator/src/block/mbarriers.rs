//! Mbarriers: objects in shared memory that count arrivals and bytes, phase after phase.
//!
//! A phase is complete when all its arrivals have come, and all bytes that it expects. An mbarrier
//! of one arrival goes through these states:
//!
//! ```text
//!                init    arrive.expect_tx 2048    a copy of 2048 lands
//! pending         1               0                        1
//! bytes           0             2048                       0
//! phase           0               0                        1
//! ```

use super::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::race::{By, Clock, Marks};
use crate::shared::{self, BARRIER};

/// The most arrivals and the most pending bytes of an mbarrier. The PTX ISA sets both to 2^20 - 1.
const MBARRIER_LIMIT: i64 = (1 << 20) - 1;

/// The state of an mbarrier, which is kept outside of its bytes in shared memory.
#[derive(Clone, Debug)]
pub(crate) struct Mbarrier {
    /// How many arrivals a whole phase has.
    expected: u32,
    /// How many arrivals the current phase still lacks.
    pending: u32,
    /// How many bytes the current phase still expects. It is negative when copies landed before
    /// they were announced.
    pub(super) bytes: i64,
    /// How many phases are complete.
    pub phase: u64,
    /// Who initialised it, and when in the time of that warp.
    pub(super) init_by: By,
    init_time: u32,
    /// The warps that have fenced the initialisation, one bit for each.
    pub(super) fenced_by: u64,
    /// Its index in clocks, and its time there in phase 0.
    pub(super) whose: usize,
    first_time: u32,
    /// What the arrivals of the current phase know.
    pub(super) arriving: Clock,
    /// What the arrivals of the last complete phase knew. Whoever waits for that phase learns it.
    released: Clock,
    /// The last arrival of each warp in the current phase, and in the phase before.
    arrivals: Marks,
    last_arrivals: Marks,
    /// The last use by each warp.
    uses: Marks,
}

impl Mbarrier {
    /// Its time in clocks, which grows by one with each phase.
    pub(super) fn time(&self) -> u32 {
        self.first_time + self.phase as u32
    }

    /// Its state, for messages.
    pub fn describe(&self) -> String {
        format!("phase {}, {} of {} arrivals and {} bytes missing", self.phase, self.pending, self.expected, self.bytes)
    }
}

impl Block<'_> {
    /// The mbarrier at an offset. It remembers the use by `by`.
    pub fn mbarrier(&mut self, offset: usize, by: By) -> Step<&mut Mbarrier> {
        let Some(barrier) = self.mbarriers.get_mut(&offset) else {
            let what = format!(
                "no mbarrier was initialised at shared {:#x}: mbarrier.init makes one",
                shared::address(offset)
            );
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        };
        let clocks = &self.shared.clocks;
        if !clocks.knows(by, barrier.init_by.warp, barrier.init_time) {
            let address = shared::address(offset);
            let what = format!("use of the mbarrier at shared {address:#x}, not ordered after its initialisation by");
            return Err(Trouble::by(FaultKind::Race, by, what).other(barrier.init_by));
        }
        barrier.uses.set(clocks, by);
        Ok(barrier)
    }

    pub fn mbarrier_init(&mut self, offset: usize, count: u32, by: By) -> Step {
        if count == 0 || count as i64 > MBARRIER_LIMIT {
            let what = format!("an mbarrier of {count} arrivals: 1 to {MBARRIER_LIMIT} are allowed");
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        }
        if self.mbarriers.contains_key(&offset) {
            let what = format!(
                "an mbarrier lives at shared {:#x} already: mbarrier.inval must end it first",
                shared::address(offset)
            );
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        }
        self.check_write(offset, 8, by, "initialisation of an mbarrier")?;
        self.shared.mark(offset, 8, BARRIER);
        let (whose, first_time) = self.shared.clocks.mbarrier(offset);
        let barrier = Mbarrier {
            expected: count,
            pending: count,
            bytes: 0,
            phase: 0,
            init_by: by,
            init_time: self.shared.clocks.now(by.warp),
            fenced_by: 0,
            whose,
            first_time,
            arriving: Clock::default(),
            released: Clock::default(),
            arrivals: Marks::default(),
            last_arrivals: Marks::default(),
            uses: Marks::default(),
        };
        self.mbarriers.insert(offset, barrier);
        self.progress += 1;
        Ok(())
    }

    pub fn mbarrier_invalidate(&mut self, offset: usize, by: By) -> Step {
        self.mbarrier(offset, by)?;
        if self.incoming.iter().any(|copy| copy.barrier == offset) {
            let what = format!("the mbarrier at shared {:#x} has bulk copies in flight", shared::address(offset));
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        }
        let barrier = self.mbarriers.remove(&offset).expect("found above");
        if let Some(other) = barrier.uses.unknown(&self.shared.clocks, by) {
            let address = shared::address(offset);
            let what = format!("the mbarrier at shared {address:#x} is invalidated, not ordered after its use by");
            return Err(Trouble::by(FaultKind::Race, by, what).other(other));
        }
        self.shared.clocks.mbarrier_ends(offset, barrier.time());
        self.shared.blank(offset, 8, by);
        self.progress += 1;
        Ok(())
    }

    /// A warp fences all initialisations, which makes them visible to the asynchronous proxy.
    pub fn fence_mbarriers(&mut self, warp: usize) {
        self.mbarriers.values_mut().for_each(|barrier| barrier.fenced_by |= 1 << warp);
    }

    /// The current phase expects `bytes` more, or fewer if they are negative.
    pub fn expect_bytes(&mut self, offset: usize, bytes: i64, by: By) -> Step {
        let barrier = self.mbarrier(offset, by)?;
        barrier.bytes += bytes;
        if barrier.bytes.abs() > MBARRIER_LIMIT {
            let what = format!(
                "the mbarrier at shared {:#x} then counts {} pending bytes, beyond {MBARRIER_LIMIT}",
                shared::address(offset),
                barrier.bytes
            );
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        }
        self.progress += 1;
        self.settle(offset)
    }

    /// Counts arrivals, and returns the phase that they belong to.
    pub fn arrive(&mut self, offset: usize, count: u32, expect: u32, drop: bool, by: By) -> Step<u64> {
        self.mbarrier(offset, by)?;
        let (clocks, barrier) = (&mut self.shared.clocks, self.mbarriers.get_mut(&offset).expect("found above"));
        let phase = barrier.phase;
        if count == 0 || count > barrier.pending {
            let what = format!(
                "{count} arrivals at the mbarrier at shared {:#x}, whose phase {phase} lacks {} of {}",
                shared::address(offset),
                barrier.pending,
                barrier.expected
            );
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        }
        if let Some(other) = barrier.last_arrivals.unknown(clocks, by) {
            let what = format!(
                "an arrival in phase {phase} of the mbarrier at shared {:#x} that could have come in the phase before: \
                 it is not ordered after the arrival there by",
                shared::address(offset)
            );
            return Err(Trouble::by(FaultKind::Barrier, by, what).other(other));
        }
        barrier.arrivals.set(clocks, by);
        clocks.release(by, &mut barrier.arriving);
        barrier.bytes += expect as i64;
        if barrier.bytes.abs() > MBARRIER_LIMIT {
            let what = format!("{} pending bytes are beyond the mbarrier's {MBARRIER_LIMIT}", barrier.bytes);
            return Err(Trouble::by(FaultKind::Barrier, by, what));
        }
        barrier.pending -= count;
        if drop {
            barrier.expected -= count;
        }
        self.progress += 1;
        self.settle(offset)?;
        Ok(phase)
    }

    /// Completes the current phase if nothing is missing.
    pub(super) fn settle(&mut self, offset: usize) -> Step {
        let in_flight: usize = self.incoming.iter().filter(|c| c.barrier == offset).map(|c| c.bytes).sum();
        let Some(barrier) = self.mbarriers.get_mut(&offset) else { return Ok(()) };
        if barrier.pending > 0 {
            return Ok(());
        }
        if barrier.bytes < 0 {
            let what = format!(
                "the mbarrier at shared {:#x} has all arrivals of phase {}, but copies brought {} bytes more than it \
                 expects",
                shared::address(offset),
                barrier.phase,
                -barrier.bytes
            );
            return Err(Trouble::new(FaultKind::BulkCopy, what));
        }
        if barrier.bytes == 0 {
            if in_flight > 0 {
                let what = format!(
                    "phase {} of the mbarrier at shared {:#x} completes while bulk copies of {in_flight} bytes to it are \
                     in flight: it expected fewer bytes than were copied",
                    barrier.phase,
                    shared::address(offset)
                );
                return Err(Trouble::new(FaultKind::BulkCopy, what));
            }
            barrier.phase += 1;
            barrier.pending = barrier.expected;
            let time = barrier.time();
            barrier.arriving.set_phases(barrier.whose, time);
            barrier.released.clone_from(&barrier.arriving);
            barrier.last_arrivals = std::mem::take(&mut barrier.arrivals);
            self.preempt = self.hands_over;
        }
        Ok(())
    }

    /// Lanes of a warp have seen that a phase is complete, and learn what its arrivals knew.
    pub fn pass(&mut self, offset: usize, warp: usize, lanes: u32) {
        if let Some(barrier) = self.mbarriers.get(&offset) {
            self.shared.clocks.acquire(warp, lanes, &barrier.released);
        }
    }
}
