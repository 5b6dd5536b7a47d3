//! Asynchronous copies in flight: bulk copies, and those of single threads (`cp.async`).

use super::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::race::By;
use crate::shared::{self, INCOMING, OUTGOING};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

/// A bulk copy from global to shared memory that has not landed.
pub(crate) struct Incoming {
    pub offset: usize,
    source: u64,
    pub bytes: usize,
    /// The offset of the mbarrier that it counts in, and the phase in which it was started.
    pub barrier: usize,
    phase: u64,
    pub(super) by: By,
}

/// A bulk copy from shared to global memory that has not been waited for.
pub(super) struct Outgoing {
    offset: usize,
    target: u64,
    bytes: usize,
    pub by: By,
    /// The number of its group among those of its thread, once that is committed.
    group: Option<u64>,
}

/// A `cp.async` that has not landed.
pub(super) struct ThreadCopy {
    offset: usize,
    bytes: usize,
    /// Where its source lies, and how many bytes are copied. Zeros fill the rest.
    source: (u64, usize),
    /// The number of its group among those of its thread.
    group: u64,
    pub by: By,
}

/// The `cp.async` copies of a thread.
#[derive(Default)]
pub(crate) struct ThreadCopies {
    /// The copies that have not landed, the oldest first.
    pub(super) in_flight: VecDeque<ThreadCopy>,
    /// How many groups the thread has committed.
    committed: u64,
}

impl ThreadCopies {
    /// Commits a group of the copies since the last one.
    pub fn commit(&mut self) {
        self.committed += 1;
    }
}

impl Block<'_> {
    /// Starts a bulk copy from global to shared memory, whose addresses are valid.
    pub fn copy_in(&mut self, offset: usize, source: u64, bytes: usize, barrier_offset: usize, by: By) -> Step {
        let barrier = self.mbarrier(barrier_offset, by)?;
        if barrier.fenced_by >> barrier.init_by.warp & 1 == 0 && barrier.fenced_by >> by.warp & 1 == 0 {
            let what = format!(
                "the mbarrier at shared {:#x} was initialised by warp {} and no fence.mbarrier_init or fence.proxy.async \
                 made it visible to bulk copies",
                shared::address(barrier_offset),
                barrier.init_by.warp
            );
            return Err(Trouble::by(FaultKind::MissingFence, by, what));
        }
        let (phase, whose, time) = (barrier.phase, barrier.whose, barrier.time() + 1);
        self.check_write(offset, bytes, by, "bulk copy")?;
        // Whoever sees that the copy has landed is ordered after what its thread knew at the start.
        let barrier = self.mbarriers.get_mut(&barrier_offset).expect("found above");
        self.shared.clocks.tell(by, &mut barrier.arriving);
        self.shared.expect(offset, bytes, whose, time, by);
        self.incoming.push_back(Incoming { offset, source, bytes, barrier: barrier_offset, phase, by });
        self.progress += 1;
        Ok(())
    }

    /// Lands a bulk copy to shared memory. `index` counts those in flight from the oldest.
    pub fn land(&mut self, index: usize) -> Step {
        let copy = self.incoming.remove(index).expect("as many are in flight");
        let placed = |trouble: Box<Trouble>| trouble.at(copy.by);
        let (_, span) = self.global.find(copy.source, copy.bytes as u64, self.hint).ok_or_else(|| {
            placed(Trouble::new(FaultKind::OutOfBounds, format!("the source {:#x} is no longer there", copy.source)))
        })?;
        let words = span.words(copy.source, copy.bytes).iter().map(|word| word.load(Relaxed));
        self.shared.land(copy.offset, words, copy.bytes);
        self.counters.bulk_in += copy.bytes as u64;
        self.progress += 1;
        let barrier = self.mbarriers.get_mut(&copy.barrier).expect("barriers with copies are not invalidated");
        if barrier.phase != copy.phase {
            let what = format!(
                "the copy completes in phase {} of the mbarrier at shared {:#x}, but was started in phase {}: the \
                 barrier expected fewer bytes",
                barrier.phase,
                shared::address(copy.barrier),
                copy.phase
            );
            return Err(placed(Trouble::new(FaultKind::BulkCopy, what)));
        }
        barrier.bytes -= copy.bytes as i64;
        self.settle(copy.barrier).map_err(placed)
    }

    /// Starts a bulk copy from shared to global memory, whose addresses are valid.
    pub fn copy_out(&mut self, offset: usize, target: u64, bytes: usize, by: By) -> Step {
        self.shared.readable_by_proxy(offset, bytes, by, "bulk copy", &mut Vec::new())?;
        self.shared.mark(offset, bytes, OUTGOING);
        self.outgoing.push(Outgoing { offset, target, bytes, by, group: None });
        self.progress += 1;
        Ok(())
    }

    /// Commits a group of the bulk copies that a thread has started since the last one.
    pub fn commit_bulk(&mut self, warp: usize, lane: usize) {
        let group = self.committed[warp][lane];
        for copy in &mut self.outgoing {
            if (copy.by.warp, copy.by.lane) == (warp, Some(lane)) && copy.group.is_none() {
                copy.group = Some(group);
            }
        }
        self.committed[warp][lane] = group + 1;
    }

    /// A thread waits for its bulk copies of all groups but the `pending` latest, which completes
    /// them.
    pub fn wait_bulk(&mut self, warp: usize, lane: usize, pending: u32) {
        let done = self.committed[warp][lane].saturating_sub(pending as u64);
        let finished =
            |c: &Outgoing| (c.by.warp, c.by.lane) == (warp, Some(lane)) && c.group.is_some_and(|group| group < done);
        let mut landed = false;
        for copy in self.outgoing.extract_if(.., |copy| finished(copy)) {
            let (_, span) = self.global.find(copy.target, copy.bytes as u64, self.hint).expect("checked at the start");
            for at in (0..copy.bytes).step_by(4) {
                span.word(copy.target + at as u64).store(self.shared.word(copy.offset + at), Relaxed);
            }
            self.shared.unmark(copy.offset, copy.bytes, OUTGOING);
            self.shared.was_read(copy.offset, copy.bytes, copy.by);
            self.counters.bulk_out += copy.bytes as u64;
            landed = true;
        }
        if landed {
            // A copy that is still in flight may read some of the same bytes.
            for copy in &self.outgoing {
                self.shared.mark(copy.offset, copy.bytes, OUTGOING);
            }
            self.progress += 1;
        }
    }

    /// The `cp.async` copies of a thread.
    pub fn thread_copies(&mut self, warp: usize, lane: usize) -> &mut ThreadCopies {
        &mut self.thread_copies[32 * warp + lane]
    }

    /// Starts a `cp.async` of a lane, whose addresses are valid. `source` has the address, and how
    /// many of the bytes are copied.
    pub fn start_thread_copy(&mut self, offset: usize, bytes: usize, source: (u64, usize), by: By) -> Step {
        self.check_write(offset, bytes, by, "asynchronous copy")?;
        self.shared.mark(offset, bytes, INCOMING);
        let copies = self.thread_copies(by.warp, by.lane.expect("a lane copies"));
        copies.in_flight.push_back(ThreadCopy { offset, bytes, source, group: copies.committed, by });
        self.progress += 1;
        Ok(())
    }

    /// A thread waits for its `cp.async` copies of all groups but the `pending` latest, which lands
    /// them. They never land earlier, so that whoever relies on them before the wait is caught.
    pub fn wait_thread_copies(&mut self, warp: usize, lane: usize, pending: u32) {
        let copies = &mut self.thread_copies[32 * warp + lane];
        let done = copies.committed.saturating_sub(pending as u64);
        // A copy that lands counts as a store of its thread. Matrix products and bulk copies may
        // read it after a proxy fence only.
        let landing = copies.in_flight.partition_point(|copy| copy.group < done);
        for copy in copies.in_flight.drain(..landing) {
            let mut words = [0; 8];
            let (source, bytes) = copy.source;
            if bytes > 0 {
                let (_, span) = self.global.find(source, bytes as u64, self.hint).expect("checked at the start");
                words.iter_mut().zip(span.words(source, bytes)).for_each(|(word, from)| *word = from.load(Relaxed));
                if bytes % 4 != 0 {
                    words[bytes / 4] &= (1 << (8 * (bytes % 4))) - 1;
                }
            }
            self.shared.store(copy.offset, copy.bytes, &words, copy.by);
            self.progress += 1;
        }
    }
}
