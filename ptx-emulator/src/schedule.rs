//! Runs the blocks of a launch on the threads of the CPU, and the warps of a block in turn.
//!
//! The order of a block follows from the seed of the launch and the number of the block. The order
//! of seed 0 is unkind:
//!
//! * A warp runs until it must wait.
//! * A barrier that completes hands over at once to a warp that waits for it. So a stage that is
//!   released too early is overwritten while it is still read.
//! * Bulk copies land only when no warp can go on without them.
//!
//! Other seeds draw each of these habits anew for each block.

use crate::block::{Block, Counters};
use crate::fault::{Fault, FaultKind, Trouble};
use crate::global::Global;
use crate::isa::{Kernel, SHARED_BASE};
use crate::shared;
use crate::warp::{Group, Start, Stop, Wait, Warp};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many operations a warp executes at most before another has its turn.
const SLICE: u64 = 20_000;
/// After so many operations without progress a copy lands, for warps that poll instead of waiting.
const POLLING: u64 = 100_000;
/// So often every blocked test gives up, without progress, before the block is declared dead.
const TIMEOUTS: u32 = 16;
/// How many multiprocessors `%nsmid` tells of: those of an H100 SXM.
const MULTIPROCESSORS: u32 = 132;

/// The sizes of a launch, for [`Module::launch`](crate::Module::launch).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// How many blocks the grid has in x, y and z.
    pub grid: [u32; 3],
    /// How many threads a block has in x, y and z.
    pub block: [u32; 3],
    /// How many bytes of dynamic shared memory each block has.
    pub shared_bytes: u32,
}

/// In which order the warps of a launch run, and when it is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which order it is. A launch does the same whenever it runs with the same seed, and a fault
    /// tells its seed.
    pub seed: u64,
    /// How many warp instructions a block may execute without any store, barrier, copy or product.
    /// More are a livelock.
    pub idle_instructions: u64,
    /// How many warp instructions a block may execute at all. More are a livelock.
    pub instructions: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { seed: 0, idle_instructions: 200_000_000, instructions: u64::MAX }
    }
}

/// Which of several warps that can run has the next turn.
#[derive(Debug)]
enum Turns {
    /// The one after that which ran last.
    Around,
    /// Any of them.
    Any,
    /// The one with the highest priority. Now and then a random warp gets the lowest.
    Priority(Vec<u32>),
}

/// How many operations a turn has.
#[derive(Clone, Copy, Debug)]
enum Slices {
    /// Each has [`SLICE`].
    Longest,
    /// Each has up to 2^n, and n is drawn for each turn from 1 to this number.
    UpTo(u32),
}

/// When bulk copies land.
#[derive(Clone, Copy, Debug)]
enum Landing {
    /// They land when nobody can go on without them.
    Late,
    /// One lands after each turn, the oldest first.
    Early,
    /// One lands after a turn, any of them, with a chance of one in four.
    Any,
}

/// The order in which a block's warps run.
#[derive(Debug)]
struct Order {
    random: Random,
    turns: Turns,
    slices: Slices,
    landing: Landing,
    hands_over: bool,
}

impl Order {
    fn new(seed: u64, block: u64, warps: usize) -> Order {
        let mut random = Random(seed.wrapping_add(block.wrapping_mul(0xd6e8_feb8_6659_fd93)));
        let unkind = Turns::Around;
        // One of eight blocks has the order of seed 0.
        if seed == 0 || random.below(8) == 0 {
            return Order { random, turns: unkind, slices: Slices::Longest, landing: Landing::Late, hands_over: true };
        }
        let turns = match random.below(3) {
            0 => Turns::Around,
            1 => Turns::Any,
            _ => Turns::Priority((0..warps).map(|_| random.below(1 << 16) as u32 + 1).collect()),
        };
        let slices = match random.below(4) {
            0 => Slices::Longest,
            1 => Slices::UpTo(5),
            _ => Slices::UpTo(12),
        };
        let landing = [Landing::Late, Landing::Early, Landing::Any][random.below(3) as usize];
        let hands_over = random.below(2) == 0;
        Order { random, turns, slices, landing, hands_over }
    }

    /// The warp that has the next turn, if any can run. `next` is the one after that which ran
    /// last.
    fn choose(&mut self, next: usize, count: usize, runnable: impl Fn(usize) -> bool) -> Option<usize> {
        let from = |start: usize| (0..count).map(|i| (start + i) % count).find(|warp| runnable(*warp));
        match &mut self.turns {
            Turns::Around => from(next),
            Turns::Any => from(self.random.below(count as u64) as usize),
            Turns::Priority(priorities) => {
                if self.random.below(32) == 0 {
                    priorities[self.random.below(count as u64) as usize] = 0;
                }
                (0..count).filter(|warp| runnable(*warp)).max_by_key(|warp| priorities[*warp])
            }
        }
    }

    /// A warp has made no progress in its turns. Others go first.
    fn defer(&mut self, warp: usize) {
        if let Turns::Priority(priorities) = &mut self.turns {
            priorities.iter_mut().for_each(|priority| *priority += 1);
            priorities[warp] = 0;
        }
    }

    /// How many operations the next turn has.
    fn slice(&mut self) -> u64 {
        match self.slices {
            Slices::Longest => SLICE,
            Slices::UpTo(power) => {
                let power = 1 + self.random.below(power as u64);
                1 + self.random.below(1 << power)
            }
        }
    }

    /// Which of the copies in flight lands after a turn, counted from the oldest.
    fn lands(&mut self, in_flight: usize) -> Option<usize> {
        let now = match self.landing {
            _ if in_flight == 0 => false,
            Landing::Late => false,
            Landing::Early => true,
            Landing::Any => self.random.below(4) == 0,
        };
        now.then(|| self.which(in_flight))
    }

    /// Which of the copies in flight lands, when one must.
    fn which(&mut self, in_flight: usize) -> usize {
        match self.landing {
            Landing::Any => self.random.below(in_flight as u64) as usize,
            Landing::Late | Landing::Early => 0,
        }
    }
}

/// The generator splitmix64 (Steele, Lea and Flood 2014).
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// A uniform number below a bound, which is small beside 2^64.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % bound
    }
}

/// A launch whose sizes were found right.
pub(crate) struct Job<'a> {
    pub kernel: &'a Kernel,
    pub global: Global<'a>,
    pub params: &'a [u8],
    pub config: LaunchConfig,
    pub options: Options,
}

impl Job<'_> {
    /// Runs all blocks. Of several faults it returns that of the lowest block.
    pub fn run(&self) -> Result<Counters, Fault> {
        let blocks: u64 = self.config.grid.iter().map(|size| *size as u64).product();
        let next = AtomicU64::new(0);
        let first_fault: Mutex<Option<(u64, Fault)>> = Mutex::new(None);
        let stop_at = AtomicU64::new(blocks);
        let total = Mutex::new(Counters::new(self.kernel));
        let work = || {
            let mut runner = Runner::new(self);
            loop {
                // Numbers are given in order, so that every block below a faulty one runs to its
                // end.
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= stop_at.load(Ordering::Relaxed) {
                    break;
                }
                if let Err(fault) = runner.run(index) {
                    stop_at.fetch_min(index, Ordering::Relaxed);
                    let mut found = first_fault.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    if found.as_ref().is_none_or(|(other, _)| index < *other) {
                        *found = Some((index, fault));
                    }
                }
            }
            total.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).add(&runner.block.counters);
        };
        let workers = (rayon::current_num_threads() as u64).min(blocks);
        if workers <= 1 {
            work();
        } else {
            rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| work())));
        }
        match first_fault.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            Some((_, fault)) => Err(fault),
            None => Ok(total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())),
        }
    }

    /// How many bytes of shared memory a block has: the static ones, and dynamic ones at their
    /// alignment.
    pub fn shared_bytes(kernel: &Kernel, dynamic: u32) -> u32 {
        let end = SHARED_BASE + kernel.static_shared;
        if dynamic == 0 {
            return kernel.static_shared;
        }
        end.next_multiple_of(kernel.dynamic_align) - SHARED_BASE + dynamic
    }
}

/// Runs one block after the other, and uses their memory again.
struct Runner<'a> {
    job: &'a Job<'a>,
    block: Block<'a>,
    warps: Vec<Warp>,
    /// The index of the block that runs.
    index: [u32; 3],
}

impl<'a> Runner<'a> {
    fn new(job: &'a Job<'a>) -> Runner<'a> {
        let threads: u32 = job.config.block.iter().product();
        let shared_bytes = Job::shared_bytes(job.kernel, job.config.shared_bytes);
        let block = Block::new(job.kernel, &job.global, job.params, shared_bytes, threads);
        let warps = (0..threads.div_ceil(32) as usize).map(|index| Warp::new(index, job.kernel)).collect();
        Runner { job, block, warps, index: [0; 3] }
    }

    /// Runs the block of a number to its end.
    fn run(&mut self, index: u64) -> Result<(), Fault> {
        let [x, y, _] = self.job.config.grid.map(u64::from);
        self.index = [(index % x) as u32, (index / x % y) as u32, (index / x / y) as u32];
        self.block.reset();
        let entry_registers = self.block.entry_registers().unwrap_or(0);
        for warp in &mut self.warps {
            warp.start(&Start {
                kernel: self.job.kernel,
                grid: self.job.config.grid,
                block: self.job.config.block,
                index: self.index,
                dynamic_shared: self.job.config.shared_bytes,
                shared_bytes: Job::shared_bytes(self.job.kernel, self.job.config.shared_bytes),
                multiprocessor: ((index % MULTIPROCESSORS as u64) as u32, MULTIPROCESSORS),
            });
            warp.registers = entry_registers;
        }
        let order = Order::new(self.job.options.seed, index, self.warps.len());
        self.block.hands_over = order.hands_over;
        self.schedule(order)?;
        self.block.check_end().map_err(|trouble| self.fault(None, None, trouble))
    }

    /// Gives turns to the warps of the block until all have exited.
    fn schedule(&mut self, mut order: Order) -> Result<(), Fault> {
        let count = self.warps.len();
        let (mut next, mut overtake, mut timeouts) = (0, false, 0);
        let mut woken = None;
        // The block's progress, and its clock when that last grew.
        let mut last = (self.block.progress, self.block.clock);
        loop {
            let chosen = match woken.take() {
                Some(warp) => Some(warp),
                None => order.choose(next, count, |i| self.warps[i].runnable(&self.block, overtake)),
            };
            if let Some(warp) = chosen {
                self.block.preempt = false;
                let stop = self.warps[warp].run(&mut self.block, order.slice(), overtake);
                let stop = stop.map_err(|(pc, trouble)| self.fault(Some(warp), Some(pc), trouble))?;
                let paused = stop == Stop::Paused;
                overtake = false;
                next = (warp + 1) % count;
                if self.block.preempt {
                    let waiting = |warp: &Warp| {
                        let at_barrier =
                            |group: &Group| matches!(group.wait, Wait::Mbarrier { .. } | Wait::Named { .. });
                        warp.groups.iter().any(at_barrier) && warp.runnable(&self.block, false)
                    };
                    woken = (0..count).map(|i| (warp + 1 + i) % count).find(|i| waiting(&self.warps[*i]));
                    // If there is nobody to wake, the warp goes on.
                    woken = woken.or(paused.then_some(warp));
                }
                if let Some(copy) = order.lands(self.block.incoming.len()) {
                    self.land(copy)?;
                }
                if self.block.clock > self.job.options.instructions {
                    let what = format!("{} warp instructions executed:{}", self.block.clock, self.describe_warps());
                    return Err(self.fault(
                        Some(warp),
                        self.program_counter(warp),
                        Trouble::new(FaultKind::Livelock, what),
                    ));
                }
                if self.block.progress != last.0 {
                    last = (self.block.progress, self.block.clock);
                    timeouts = 0;
                    continue;
                }
                let idle = self.block.clock - last.1;
                if idle > SLICE {
                    order.defer(warp);
                }
                if idle > POLLING && !self.block.incoming.is_empty() {
                    self.land(order.which(self.block.incoming.len()))?;
                    last = (self.block.progress, self.block.clock);
                } else if idle > self.job.options.idle_instructions {
                    let what = format!(
                        "{idle} warp instructions without a store, barrier, copy or product:{}",
                        self.describe_warps()
                    );
                    return Err(self.fault(
                        Some(warp),
                        self.program_counter(warp),
                        Trouble::new(FaultKind::Livelock, what),
                    ));
                }
                continue;
            }
            if self.warps.iter().all(|warp| warp.groups.is_empty()) {
                return Ok(());
            }
            if !self.block.incoming.is_empty() {
                self.land(order.which(self.block.incoming.len()))?;
                continue;
            }
            if !overtake && self.warps.iter().any(|warp| warp.runnable(&self.block, true)) {
                overtake = true;
                continue;
            }
            // A `try_wait` may give up after a while, and a kernel may do something else then.
            let mut groups = self.warps.iter_mut().flat_map(|warp| &mut warp.groups);
            if timeouts < TIMEOUTS
                && groups.by_ref().fold(false, |any, group| {
                    let waits = matches!(group.wait, Wait::Mbarrier { .. });
                    group.timeout |= waits;
                    any | waits
                })
            {
                timeouts += 1;
                continue;
            }
            let what = format!("no warp can ever go on:{}", self.describe_warps());
            let warp = self.warps.iter().position(|warp| !warp.groups.is_empty()).unwrap_or(0);
            return Err(self.fault(Some(warp), self.program_counter(warp), Trouble::new(FaultKind::Deadlock, what)));
        }
    }

    /// Lands a copy, counted from the oldest.
    fn land(&mut self, copy: usize) -> Result<(), Fault> {
        self.block.land(copy).map_err(|trouble| self.fault(None, None, trouble))
    }

    /// Where the first group of a warp stands.
    fn program_counter(&self, warp: usize) -> Option<usize> {
        self.warps[warp].groups.first().map(|group| group.pc)
    }

    /// Makes a fault of a trouble, with its place in the text. `warp` was running, at operation
    /// `pc`.
    fn fault(&self, warp: Option<usize>, pc: Option<usize>, trouble: impl Into<Box<Trouble>>) -> Fault {
        let trouble = *trouble.into();
        let kernel = self.job.kernel;
        let (warp, statement) = match trouble.culprit {
            Some(by) => (Some(by.warp as u32), Some(by.statement)),
            None => (warp.map(|warp| warp as u32), pc.map(|pc| kernel.code[pc].statement)),
        };
        let line = statement.map(|statement| &kernel.lines[statement as usize]);
        let other = trouble.other.map_or(String::new(), |by| {
            let line = &kernel.lines[by.statement as usize];
            format!(" warp {}, line {}: `{}`", by.warp, line.line, crate::fault::shorten(&line.text))
        });
        Fault {
            kind: trouble.kind,
            kernel: kernel.name.clone(),
            block: self.index,
            seed: self.job.options.seed,
            warp,
            lane: trouble.lane,
            line: line.map_or(0, |line| line.line),
            instruction: line.map_or(String::new(), |line| line.text.clone()),
            what: trouble.what + &other,
        }
    }

    /// Where each warp stands and what it waits for, in one line for each group of lanes.
    fn describe_warps(&self) -> String {
        let mut out = String::new();
        for warp in &self.warps {
            if warp.groups.is_empty() {
                out += &format!("\n  warp {}: exited", warp.index);
            }
            for group in &warp.groups {
                let line = &self.job.kernel.lines[self.job.kernel.code[group.pc].statement as usize];
                let wait = self.describe_wait(warp, group);
                let text = crate::fault::shorten(&line.text);
                out += &format!(
                    "\n  warp {} lanes {:#010x}: line {}: `{text}`: {wait}",
                    warp.index, group.mask, line.line
                );
            }
        }
        out
    }

    fn describe_wait(&self, warp: &Warp, group: &Group) -> String {
        match group.wait {
            Wait::Ready => "runs".into(),
            Wait::Lanes => format!("waits for other lanes of {:#010x}", warp.live & !group.mask),
            Wait::Mbarrier { offset, parity, phase } => {
                let state = match self.block.mbarriers.get(&offset) {
                    Some(barrier) => barrier.describe(),
                    None => "invalidated".into(),
                };
                let wanted = match parity {
                    Some(parity) => format!("a phase of parity {parity}"),
                    None => format!("phase {phase}"),
                };
                format!("waits for {wanted} of the mbarrier at shared {:#x} ({state})", shared::address(offset))
            }
            Wait::Named { id, .. } => {
                let named = &self.block.named[id as usize];
                format!("waits at named barrier {id}, where {} of {} threads are", named.arrived, named.threads)
            }
            Wait::Products(products) => {
                let first = warp.index / 4 * 4;
                let lacking: Vec<String> = (first..first + 4)
                    .filter(|i| self.block.warpgroups[warp.index / 4].issued[i % 4] < products)
                    .map(|i| i.to_string())
                    .collect();
                format!("waits for products that warp {} of its warpgroup has not issued", lacking.join(", "))
            }
            Wait::Registers(more) => {
                format!("waits for {more} more registers a thread; {} are free", self.block.free_registers.unwrap_or(0))
            }
        }
    }
}
