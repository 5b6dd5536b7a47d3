//! What the warps of a block share: its memory, its barriers, copies in flight and free registers.

use crate::banks::SharedAccesses;
use crate::fault::{FaultKind, Step, Trouble};
use crate::global::Global;
use crate::isa::Kernel;
use crate::race::By;
use crate::shared::Shared;
use crate::tensor_core::wgmma::{Tiles, Warpgroup};
use copies::{Incoming, Outgoing, ThreadCopies};
use mbarriers::Mbarrier;
use named_barriers::NamedBarrier;
use std::collections::{BTreeMap, VecDeque};

mod copies;
mod mbarriers;
mod named_barriers;

/// What the statistics of a launch are made of. They are summed over its blocks.
#[derive(Clone, Default)]
pub(crate) struct Counters {
    /// How often each operation of the kernel was executed.
    pub operations: Vec<u64>,
    /// Bytes that bulk copies brought to shared and to global memory.
    pub bulk_in: u64,
    pub bulk_out: u64,
    /// Bytes that ordinary loads read, and that ordinary stores wrote.
    pub loaded: u64,
    pub stored: u64,
    /// By statement: how the banks of shared memory served it.
    pub shared: Vec<SharedAccesses>,
    /// How many multiply-adds `wgmma` and `mma.sync` did.
    pub products: u64,
}

impl Counters {
    pub fn new(kernel: &Kernel) -> Counters {
        let shared = vec![SharedAccesses::default(); kernel.lines.len()];
        Counters { operations: vec![0; kernel.code.len()], shared, ..Counters::default() }
    }

    /// Adds what another block counted.
    pub fn add(&mut self, other: &Counters) {
        self.operations.iter_mut().zip(&other.operations).for_each(|(sum, count)| *sum += count);
        self.shared.iter_mut().zip(&other.shared).for_each(|(sum, count)| sum.add(count));
        self.bulk_in += other.bulk_in;
        self.bulk_out += other.bulk_out;
        self.loaded += other.loaded;
        self.stored += other.stored;
        self.products += other.products;
    }
}

/// The state of a running block, without that of its warps.
pub(crate) struct Block<'a> {
    pub kernel: &'a Kernel,
    pub global: &'a Global<'a>,
    pub params: &'a [u8],
    pub shared: Shared,
    /// The mbarrier at each offset in shared memory that has one.
    pub mbarriers: BTreeMap<usize, Mbarrier>,
    pub named: [NamedBarrier; 16],
    /// The bulk copies to shared memory that are in flight, the oldest first.
    pub incoming: VecDeque<Incoming>,
    /// The bulk copies from shared memory that are in flight.
    outgoing: Vec<Outgoing>,
    /// How many groups of bulk copies each lane of each warp has committed.
    committed: Vec<[u64; 32]>,
    /// The `cp.async` copies of each thread.
    thread_copies: Vec<ThreadCopies>,
    pub warpgroups: Vec<Warpgroup>,
    pub tiles: Tiles,
    /// Registers that no warp holds, counted for each thread of a warp. `None` when the kernel has
    /// no launch bounds, without which `setmaxnreg` is a fault.
    pub free_registers: Option<u32>,
    /// Whether a barrier that completes hands over to a warp that waits for it.
    pub hands_over: bool,
    /// A barrier has completed and hands over: the running warp must stop.
    pub preempt: bool,
    /// Grows when something happens that may let a waiting warp go on.
    pub progress: u64,
    /// The time: how many warp operations the block has executed.
    pub clock: u64,
    pub threads: u32,
    pub counters: Counters,
    /// The global allocation that was found last. The next access is often to the same one.
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
            thread_copies: (0..32 * warps).map(|_| ThreadCopies::default()).collect(),
            warpgroups: (0..warps.div_ceil(4)).map(Warpgroup::new).collect(),
            tiles: Tiles::default(),
            free_registers: None,
            hands_over: false,
            preempt: false,
            progress: 0,
            clock: 0,
            threads,
            counters: Counters::new(kernel),
            hint: 0,
        }
    }

    /// Makes all as new for the next block, except the counters.
    pub fn reset(&mut self) {
        self.shared.reset();
        self.mbarriers.clear();
        self.named = Default::default();
        self.incoming.clear();
        self.outgoing.clear();
        self.committed.iter_mut().for_each(|lanes| *lanes = [0; 32]);
        self.thread_copies.iter_mut().for_each(|copies| *copies = ThreadCopies::default());
        self.warpgroups.iter_mut().for_each(Warpgroup::reset);
        self.free_registers = self.kernel.max_threads.map(|_| 0);
        self.preempt = false;
        self.progress = 0;
        self.clock = 0;
    }

    /// How many registers ptxas gives a thread at entry, if the kernel has launch bounds and uses
    /// `setmaxnreg`.
    pub fn entry_registers(&self) -> Option<u32> {
        let threads = self.kernel.max_threads?.next_multiple_of(32);
        Some((65536 / (threads * self.kernel.min_blocks) / 8 * 8).clamp(24, 256))
    }

    /// Fails if something is in flight when the block ends.
    pub fn check_end(&self) -> Step {
        let placed =
            |by, what: &str| Err(Trouble::new(FaultKind::Race, format!("the block ended while this {what}")).at(by));
        if let Some(copy) = self.incoming.front() {
            return placed(copy.by, "bulk copy to shared memory was in flight: nobody waited for it");
        }
        if let Some(copy) = self.outgoing.first() {
            return placed(copy.by, "bulk copy from shared memory was in flight: no wait_group completed it");
        }
        if let Some(copy) = self.thread_copies.iter().find_map(|copies| copies.in_flight.front()) {
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

    /// Fails if bytes may not be written. Nobody else may use them now, and the writer must be
    /// ordered after all who did.
    #[inline]
    pub fn check_write(&self, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        self.shared.writable(offset, bytes, by, doing)?;
        for group in &self.warpgroups {
            group.check_write(&self.shared.clocks, offset, bytes, by, doing)?;
        }
        Ok(())
    }
}
