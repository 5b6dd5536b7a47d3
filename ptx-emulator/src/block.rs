//! What the warps of a block share beside memory: mbarriers, named barriers, asynchronous copies in flight, the register pool.

use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::Kernel;
use crate::memory::Global;
use crate::race::{By, Clock, Marks};
use crate::shared::{self, BARRIER, INCOMING, OUTGOING, Shared};
use crate::wgmma::{Panels, Warpgroup};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;

/// Largest count of an mbarrier (PTX ISA: 2^20 - 1), and of its pending bytes either way.
const MBARRIER_LIMIT: i64 = (1 << 20) - 1;

/// An mbarrier object.
#[derive(Clone, Debug)]
pub(crate) struct Mbarrier {
    /// Arrivals of a whole phase.
    expected: u32,
    /// Arrivals that the current phase still lacks.
    pending: u32,
    /// Bytes that the current phase still expects; negative when copies came before their announcement.
    bytes: i64,
    /// Phases completed.
    pub phase: u64,
    init_by: By,
    /// Own time of its warp at the initialisation.
    init_time: u32,
    /// Warps that fenced the initialisation, one bit each.
    fenced_by: u64,
    /// Its index in clocks, and its time there in phase 0.
    whose: usize,
    first_time: u32,
    /// What those knew who have arrived, and those who had when the last phase completed.
    arriving: Clock,
    released: Clock,
    /// Arrivals in the current phase, and in the ones before.
    arrivals: Marks,
    last_arrivals: Marks,
    uses: Marks,
}

impl Mbarrier {
    /// Its time in clocks: phases completed, from the first time on.
    fn time(&self) -> u32 {
        self.first_time + self.phase as u32
    }

    pub fn describe(&self) -> String {
        format!("phase {}, {} of {} arrivals and {} bytes missing", self.phase, self.pending, self.expected, self.bytes)
    }
}

/// One of the 16 named barriers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Named {
    /// Threads that have arrived.
    pub arrived: u32,
    /// Threads that take part in the current round.
    pub threads: u32,
    /// Rounds completed.
    pub round: u64,
    /// Threads of the current round whose predicate held, and of the last one: their number, and the number of voters.
    votes: (u32, u32),
    pub last_votes: (u32, u32),
    /// What those knew who have arrived in the current round.
    arriving: Clock,
    arrivals: Marks,
    last_arrivals: Marks,
    /// Warps that wait for the current round, and which of their lanes.
    waiting: Vec<(usize, u32)>,
}

/// A copy from global to shared memory that has not landed.
pub(crate) struct Incoming {
    pub offset: usize,
    source: u64,
    pub bytes: usize,
    barrier: usize,
    phase: u64,
    by: By,
}

/// A copy from shared to global memory that has not been waited for.
struct Outgoing {
    offset: usize,
    target: u64,
    bytes: usize,
    by: By,
    /// The thread's group, once committed.
    group: Option<u64>,
}

/// A thread's `cp.async` that has not landed.
struct AsyncCopy {
    offset: usize,
    source: u64,
    bytes: usize,
    /// The thread's group that it is in, or will be once committed.
    group: u64,
    by: By,
}

/// The `cp.async`s of a thread.
#[derive(Default)]
pub(crate) struct AsyncCopies {
    /// The oldest first.
    in_flight: VecDeque<AsyncCopy>,
    /// Groups committed.
    committed: u64,
}

impl AsyncCopies {
    pub fn commit(&mut self) {
        self.committed += 1;
    }
}

/// What a launch's statistics are made of, summed over blocks.
#[derive(Clone, Default)]
pub(crate) struct Counters {
    /// Executions of each operation.
    pub operations: Vec<u64>,
    pub bulk_in: u64,
    pub bulk_out: u64,
    pub loaded: u64,
    pub stored: u64,
    pub products: u64,
}

/// The state of a running block beside its warps.
pub(crate) struct Block<'a> {
    pub kernel: &'a Kernel,
    pub global: &'a Global<'a>,
    pub params: &'a [u8],
    pub shared: Shared,
    /// By offset in shared memory.
    pub mbarriers: BTreeMap<usize, Mbarrier>,
    pub named: [Named; 16],
    pub incoming: VecDeque<Incoming>,
    outgoing: Vec<Outgoing>,
    /// Groups committed by each thread, 32 of a warp together.
    committed: Vec<[u64; 32]>,
    /// By thread.
    async_copies: Vec<AsyncCopies>,
    pub warpgroups: Vec<Warpgroup>,
    pub panels: Panels,
    /// Registers nobody holds, counted per thread of a warp; `None` when the kernel has no launch bounds.
    pub free_registers: Option<u32>,
    /// Whether a barrier that completes hands over to the warps waiting for it, and whether one has.
    pub hands_over: bool,
    pub preempt: bool,
    /// Grows when something happens that may let a waiting warp go on.
    pub progress: u64,
    /// Instructions executed, the block's clock.
    pub clock: u64,
    pub threads: u32,
    pub counters: Counters,
    /// Global allocation found last.
    pub hint: usize,
}

impl<'a> Block<'a> {
    pub fn new(
        kernel: &'a Kernel,
        global: &'a Global<'a>,
        params: &'a [u8],
        shared_bytes: u32,
        threads: u32,
    ) -> Block<'a> {
        let warps = threads.div_ceil(32) as usize;
        Block {
            kernel,
            global,
            params,
            shared: Shared::new(shared_bytes, warps),
            mbarriers: BTreeMap::new(),
            named: Default::default(),
            incoming: VecDeque::new(),
            outgoing: Vec::new(),
            committed: vec![[0; 32]; warps],
            async_copies: (0..32 * warps).map(|_| AsyncCopies::default()).collect(),
            warpgroups: (0..warps.div_ceil(4)).map(Warpgroup::new).collect(),
            panels: Panels::default(),
            free_registers: None,
            hands_over: false,
            preempt: false,
            progress: 0,
            clock: 0,
            threads,
            counters: Counters { operations: vec![0; kernel.code.len()], ..Counters::default() },
            hint: 0,
        }
    }

    /// As new, for the next block; the counters go on.
    pub fn reset(&mut self) {
        self.shared.reset();
        self.mbarriers.clear();
        self.named = Default::default();
        self.incoming.clear();
        self.outgoing.clear();
        self.committed.iter_mut().for_each(|lanes| *lanes = [0; 32]);
        self.async_copies.iter_mut().for_each(|copies| *copies = AsyncCopies::default());
        self.warpgroups.iter_mut().for_each(Warpgroup::reset);
        self.free_registers = self.kernel.max_threads.map(|_| 0);
        self.preempt = false;
        self.progress = 0;
        self.clock = 0;
    }

    /// Registers of each thread at entry: what ptxas gives a kernel with launch bounds that uses `setmaxnreg`.
    pub fn entry_registers(&self) -> Option<u32> {
        let threads = self.kernel.max_threads?.next_multiple_of(32);
        Some((65536 / (threads * self.kernel.min_blocks) / 8 * 8).clamp(24, 256))
    }

    // Mbarriers.

    /// The barrier at an offset, for a use of it.
    pub fn mbarrier(&mut self, offset: usize, by: By) -> Step<&mut Mbarrier> {
        let Some(barrier) = self.mbarriers.get_mut(&offset) else {
            let what = format!("no mbarrier was initialised at shared {:#x}", shared::address(offset));
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
            let what = format!("an mbarrier lives at shared {:#x} already, not invalidated", shared::address(offset));
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

    /// Makes initialisations visible to the asynchronous proxy.
    pub fn fence_mbarriers(&mut self, warp: usize) {
        self.mbarriers.values_mut().for_each(|barrier| barrier.fenced_by |= 1 << warp);
    }

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

    /// Counts arrivals and returns the phase that they belong to.
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

    /// Completes the phase if nothing is missing.
    fn settle(&mut self, offset: usize) -> Step {
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

    /// Lanes of a warp have seen that a phase of the barrier at an offset is over.
    pub fn pass(&mut self, offset: usize, warp: usize, lanes: u32) {
        if let Some(barrier) = self.mbarriers.get(&offset) {
            self.shared.clocks.acquire(warp, lanes, &barrier.released);
        }
    }

    // Bulk copies.

    /// Starts a copy from global to shared memory. Addresses were found valid.
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
        // Who knows that the copy is complete knows that what its thread knew when it started it is over.
        let barrier = self.mbarriers.get_mut(&barrier_offset).expect("found above");
        self.shared.clocks.tell(by, &mut barrier.arriving);
        self.shared.expect(offset, bytes, whose, time, by);
        self.incoming.push_back(Incoming { offset, source, bytes, barrier: barrier_offset, phase, by });
        self.progress += 1;
        Ok(())
    }

    /// Completes a copy to shared memory; they are counted from the oldest.
    pub fn land(&mut self, index: usize) -> Step {
        let copy = self.incoming.remove(index).expect("as many are in flight");
        let placed = |trouble: Box<Trouble>| trouble.at(copy.by);
        let (_, span) = self.global.find(copy.source, copy.bytes as u64, self.hint).ok_or_else(|| {
            placed(Trouble::new(FaultKind::OutOfBounds, format!("the source {:#x} is no longer there", copy.source)))
        })?;
        let first = ((copy.source - span.base) / 4) as usize;
        let words = span.words[first..first + copy.bytes / 4].iter().map(|word| word.load(Relaxed));
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

    /// Starts a copy from shared to global memory.
    pub fn copy_out(&mut self, offset: usize, target: u64, bytes: usize, by: By) -> Step {
        self.shared.readable_by_proxy(offset, bytes, by, "bulk copy", &mut Vec::new())?;
        self.shared.mark(offset, bytes, OUTGOING);
        self.outgoing.push(Outgoing { offset, target, bytes, by, group: None });
        self.progress += 1;
        Ok(())
    }

    pub fn commit_copies(&mut self, warp: usize, lane: usize) {
        let group = self.committed[warp][lane];
        for copy in &mut self.outgoing {
            if (copy.by.warp, copy.by.lane) == (warp, Some(lane)) && copy.group.is_none() {
                copy.group = Some(group);
            }
        }
        self.committed[warp][lane] = group + 1;
    }

    /// Completes a thread's copies of all but its `pending` latest groups.
    pub fn wait_copies(&mut self, warp: usize, lane: usize, pending: u32) {
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
            // Two copies may have had bytes in common.
            for copy in &self.outgoing {
                self.shared.mark(copy.offset, copy.bytes, OUTGOING);
            }
            self.progress += 1;
        }
    }

    // Copies of single threads.

    /// The `cp.async`s of a thread.
    pub fn async_copies(&mut self, warp: usize, lane: usize) -> &mut AsyncCopies {
        &mut self.async_copies[32 * warp + lane]
    }

    /// Starts a copy from global to shared memory. Addresses were found valid.
    pub fn start_async_copy(&mut self, offset: usize, source: u64, bytes: usize, by: By, lane: usize) -> Step {
        self.check_write(offset, bytes, by, "asynchronous copy")?;
        self.shared.mark(offset, bytes, INCOMING);
        let copies = self.async_copies(by.warp, lane);
        copies.in_flight.push_back(AsyncCopy { offset, source, bytes, group: copies.committed, by });
        self.progress += 1;
        Ok(())
    }

    /// Completes a thread's copies of all but its `pending` latest groups. They land no earlier: whoever relies on them before the
    /// wait is caught.
    pub fn wait_async_copies(&mut self, warp: usize, lane: usize, pending: u32) {
        let copies = &mut self.async_copies[32 * warp + lane];
        let done = copies.committed.saturating_sub(pending as u64);
        // They count as stores of the thread: matrix products and bulk copies read them after a proxy fence only.
        let landing = copies.in_flight.partition_point(|copy| copy.group < done);
        for copy in copies.in_flight.drain(..landing) {
            let (_, span) = self.global.find(copy.source, copy.bytes as u64, self.hint).expect("checked at the start");
            let mut words = [0; 8];
            for (i, word) in words[..copy.bytes / 4].iter_mut().enumerate() {
                *word = span.word(copy.source + 4 * i as u64).load(Relaxed);
            }
            self.shared.store(copy.offset, copy.bytes, &words, copy.by);
            self.progress += 1;
        }
    }

    /// Nothing may be in flight when the block ends.
    pub fn check_end(&self) -> Step {
        let placed =
            |by, what: &str| Err(Trouble::new(FaultKind::Race, format!("the block ended while this {what}")).at(by));
        if let Some(copy) = self.incoming.front() {
            return placed(copy.by, "bulk copy to shared memory was in flight: nobody waited for it");
        }
        if let Some(copy) = self.outgoing.first() {
            return placed(copy.by, "bulk copy from shared memory was in flight: no wait_group completed it");
        }
        if let Some(copy) = self.async_copies.iter().find_map(|copies| copies.in_flight.front()) {
            return placed(copy.by, "asynchronous copy was in flight: no cp.async wait completed it");
        }
        for group in &self.warpgroups {
            if let Some(product) = group.in_flight() {
                return placed(
                    product.by,
                    "product was in flight: not all four warps of the warpgroup completed it with wgmma.wait_group",
                );
            }
        }
        Ok(())
    }

    /// Fails when bytes may not be written: nobody else may use them, and the writer must know all who did.
    #[inline]
    pub fn check_write(&self, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        self.shared.writable(offset, bytes, by, doing)?;
        for group in &self.warpgroups {
            group.check_write(&self.shared.clocks, offset, bytes, by, doing)?;
        }
        Ok(())
    }

    // Named barriers.

    /// Arrival of `arriving` threads, `votes` of them with a true predicate, and of `waiting` lanes that wait; returns the round to
    /// wait for.
    pub fn named_arrive(
        &mut self,
        id: u32,
        threads: Option<u32>,
        arriving: u32,
        votes: u32,
        waiting: u32,
        by: By,
    ) -> Step<u64> {
        let all = self.threads.next_multiple_of(32);
        let clocks = &mut self.shared.clocks;
        let Some(barrier) = self.named.get_mut(id as usize) else {
            return Err(Trouble::new(FaultKind::Barrier, format!("named barrier {id}: a block has 0 to 15")));
        };
        let threads = threads.unwrap_or(all);
        if threads == 0 || !threads.is_multiple_of(32) || threads > all {
            let what = format!("named barrier {id} for {threads} threads: a multiple of 32 up to {all} is allowed");
            return Err(Trouble::new(FaultKind::Barrier, what));
        }
        if barrier.arrived > 0 && barrier.threads != threads {
            let what =
                format!("named barrier {id} is for {threads} threads here, and for {} elsewhere", barrier.threads);
            return Err(Trouble::new(FaultKind::Barrier, what));
        }
        barrier.threads = threads;
        barrier.arrived += arriving;
        barrier.votes.0 += votes;
        barrier.votes.1 += arriving;
        if barrier.arrived > threads {
            let what = format!("{} threads arrived at named barrier {id} of {threads}", barrier.arrived);
            return Err(Trouble::new(FaultKind::Barrier, what));
        }
        if let Some(other) = barrier.last_arrivals.unknown(clocks, by) {
            let what = format!(
                "an arrival at named barrier {id} that could have come in the round before: it is not ordered after the \
                 arrival there by"
            );
            return Err(Trouble::new(FaultKind::Barrier, what).other(other));
        }
        barrier.arrivals.set(clocks, by);
        clocks.release(by, &mut barrier.arriving);
        if waiting != 0 {
            barrier.waiting.push((by.warp, waiting));
        }
        let round = barrier.round;
        if barrier.arrived == threads {
            for (warp, lanes) in barrier.waiting.drain(..) {
                clocks.acquire(warp, lanes, &barrier.arriving);
            }
            barrier.arriving.clear();
            barrier.last_arrivals = std::mem::take(&mut barrier.arrivals);
            barrier.arrived = 0;
            barrier.round += 1;
            barrier.last_votes = std::mem::take(&mut barrier.votes);
            self.preempt = self.hands_over;
        }
        self.progress += 1;
        Ok(round)
    }
}
