//! A warp: its registers, its groups of lanes, and the loop that executes operations.
//!
//! Lanes that go the same way form a group with one program counter. The group with the lowest one runs first, so that groups
//! meet again where their ways join; an instruction that needs lanes of other groups makes its group wait for them. A waiting
//! group never holds another up for ever: when nothing else in the block can run, the other groups may overtake it.

use crate::alu::*;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;
use crate::memory::{Span, store_part};
use crate::shared::misaligned;
use crate::wgmma;
use std::sync::atomic::Ordering::Relaxed;

/// What a group waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Nothing: it can run.
    Ready,
    /// Other lanes, to execute an instruction together.
    Lanes,
    /// A phase of the mbarrier at an offset to complete: by parity, or by number.
    Mbarrier { offset: usize, parity: Option<u32>, phase: u64 },
    /// A round of a named barrier.
    Named { id: u32, round: u64 },
    /// The other warps of the warpgroup to issue so many products.
    Products(u64),
    /// Registers that other warps give back, so many per thread.
    Registers(u32),
}

/// Lanes with a common program counter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub pc: usize,
    pub mask: u32,
    pub wait: Wait,
    /// The named barrier and round at which the group has arrived already.
    arrived: Option<(u32, u64)>,
    /// The next blocking test gives up instead of waiting.
    pub timeout: bool,
}

/// How a register stands to the products in flight.
#[derive(Clone, Copy, Default)]
struct Fragment {
    /// Products that must be complete before it may be touched.
    until: u64,
    role: Role,
    /// Columns of the product it accumulates.
    n: usize,
    /// `wgmma.fence`s executed when an ordinary instruction last touched it, plus one; [`ALWAYS`] for a constant.
    touched: u64,
}

/// A constant moved to a register of a product is a write at the time of the move.
const ALWAYS: u64 = u64::MAX;

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Role {
    #[default]
    Accumulator,
    MatrixA,
    /// Copied by `mov` from an accumulator in flight: ptxas joins the two.
    Copy,
}

/// A warp of a block.
pub(crate) struct Warp {
    pub index: usize,
    pub predicates: Vec<u32>,
    pub r32: Vec<Lanes<u32>>,
    pub r64: Vec<Lanes<u64>>,
    pub groups: Vec<Group>,
    /// Lanes that exist and have not exited.
    pub live: u32,
    /// Which of several ready groups runs: rotates when one takes too long.
    turn: usize,
    /// Local memory, lane after lane.
    local: Vec<u32>,
    fragments: Vec<Fragment>,
    /// `wgmma.fence`s executed.
    fences: u64,
    /// Products issued when each wgmma group was committed.
    commits: Vec<u64>,
    /// Products known complete.
    complete: u64,
    /// Registers of each thread, when they are counted.
    pub registers: u32,
}

/// Where a warp starts.
pub(crate) struct Start<'a> {
    pub kernel: &'a Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub index: [u32; 3],
    pub dynamic_shared: u32,
    pub shared_bytes: u32,
    /// Multiprocessor the block runs on, and their number.
    pub multiprocessor: (u32, u32),
}

/// What an undefined register holds, a NaN in every format.
const POISON: u32 = 0xffff_ffff;

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Every lane has exited.
    Done,
    /// Every group waits.
    Blocked,
    /// It can go on, but others should run first.
    Paused,
}

/// What an operation tells the loop.
enum Flow {
    Next,
    /// Wait, then execute the operation again.
    Again(Wait),
    /// Go on, after other warps had a turn.
    Pause,
}

impl Warp {
    pub fn new(index: usize, kernel: &Kernel) -> Warp {
        Warp {
            index,
            predicates: vec![0; kernel.registers[0]],
            r32: vec![[POISON; 32]; kernel.registers[1]],
            r64: vec![[u64::MAX; 32]; kernel.registers[2]],
            groups: Vec::new(),
            live: 0,
            turn: 0,
            local: vec![POISON; kernel.local_bytes.div_ceil(4) as usize * 32],
            fragments: vec![Fragment::default(); if kernel.has_wgmma { kernel.registers[1] } else { 0 }],
            fences: 0,
            commits: Vec::new(),
            complete: 0,
            registers: 0,
        }
    }

    /// Registers, constants and special registers at entry.
    pub fn start(&mut self, start: &Start) {
        let kernel = start.kernel;
        self.predicates.fill(0);
        self.r32.fill([POISON; 32]);
        self.r64.fill([u64::MAX; 32]);
        self.local.fill(POISON);
        self.fragments.fill(Fragment::default());
        (self.fences, self.complete, self.turn) = (0, 0, 0);
        self.commits.clear();
        self.predicates[kernel.true_predicate as usize] = u32::MAX;
        for (r, value) in &kernel.constants32 {
            self.r32[*r as usize] = [*value; 32];
            if kernel.has_wgmma {
                self.fragments[*r as usize].touched = ALWAYS;
            }
        }
        for (r, value) in &kernel.constants64 {
            self.r64[*r as usize] = [*value; 32];
        }
        let threads: u32 = start.block.iter().product();
        let first = self.index as u32 * 32;
        for (r, special) in &kernel.specials {
            self.r32[*r as usize] = std::array::from_fn(|lane| {
                let thread = first + lane as u32;
                let [x, y, _] = start.block;
                match *special {
                    Special::Tid(0) => thread % x,
                    Special::Tid(1) => thread / x % y,
                    Special::Tid(_) => thread / x / y,
                    Special::Ntid(axis) => start.block[axis],
                    Special::Ctaid(axis) => start.index[axis],
                    Special::Nctaid(axis) => start.grid[axis],
                    Special::LaneId => lane as u32,
                    Special::WarpId => self.index as u32,
                    Special::NwarpId => threads.div_ceil(32),
                    Special::SmId => start.multiprocessor.0,
                    Special::NsmId => start.multiprocessor.1,
                    Special::LanemaskEq => 1 << lane,
                    Special::LanemaskLe => u32::MAX >> (31 - lane),
                    Special::LanemaskLt => (1 << lane) - 1,
                    Special::LanemaskGe => u32::MAX << lane,
                    Special::LanemaskGt => !(u32::MAX >> (31 - lane)),
                    Special::DynamicSmem => start.dynamic_shared,
                    Special::TotalSmem => start.shared_bytes,
                    Special::Zero => 0,
                    Special::One => 1,
                }
            });
        }
        let lanes = (threads - first).min(32);
        self.live = u32::MAX >> (32 - lanes);
        self.groups.clear();
        self.groups.push(Group { pc: 0, mask: self.live, wait: Wait::Ready, arrived: None, timeout: false });
    }

    /// Whether some group can run. With `overtake`, groups behind one that waits may.
    pub fn runnable(&self, block: &Block, overtake: bool) -> bool {
        self.select(block, overtake).is_some()
    }

    /// Whether what a group waits for has come.
    fn ready(&self, group: &Group, block: &Block) -> bool {
        match group.wait {
            Wait::Ready => true,
            Wait::Lanes => false,
            Wait::Mbarrier { offset, parity, phase } => {
                group.timeout
                    || block.mbarriers.get(&offset).is_none_or(|barrier| match parity {
                        Some(parity) => barrier.phase & 1 != parity as u64,
                        None => barrier.phase > phase,
                    })
            }
            Wait::Named { id, round } => block.named[id as usize].round > round,
            Wait::Products(products) => block.warpgroups[self.index / 4].reached(products),
            Wait::Registers(more) => block.free_registers.is_none_or(|free| free >= more),
        }
    }

    /// The group to run: the lowest program counter, or another's turn.
    fn select(&self, block: &Block, overtake: bool) -> Option<usize> {
        if let [group] = self.groups[..] {
            return self.ready(&group, block).then_some(0);
        }
        let mut order: Vec<usize> = (0..self.groups.len()).collect();
        order.sort_unstable_by_key(|i| self.groups[*i].pc);
        let mut ready = Vec::new();
        for i in order {
            let group = &self.groups[i];
            if self.ready(group, block) {
                ready.push(i);
            } else if matches!(group.wait, Wait::Mbarrier { .. }) && !overtake && ready.is_empty() {
                // The others wait where the ways join.
                return None;
            }
        }
        (!ready.is_empty()).then(|| ready[self.turn % ready.len()])
    }

    /// Runs until the warp blocks, ends, yields, or has executed about `budget` operations.
    pub fn run(&mut self, block: &mut Block, budget: u64, overtake: bool) -> Result<Stop, (usize, Box<Trouble>)> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("lzcnt")
        {
            // SAFETY: the CPU was just found to have the features that the function is compiled for.
            return unsafe { self.run_avx2(block, budget, overtake) };
        }
        self.interpret(block, budget, overtake)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt")]
    fn run_avx2(&mut self, block: &mut Block, budget: u64, overtake: bool) -> Result<Stop, (usize, Box<Trouble>)> {
        self.interpret(block, budget, overtake)
    }

    #[inline(always)]
    fn interpret(&mut self, block: &mut Block, budget: u64, overtake: bool) -> Result<Stop, (usize, Box<Trouble>)> {
        let kernel = block.kernel;
        let code = &kernel.code[..];
        let end = block.clock + budget;
        'select: loop {
            if self.groups.is_empty() {
                return Ok(Stop::Done);
            }
            let Some(mut chosen) = self.select(block, overtake) else { return Ok(Stop::Blocked) };
            let mut pc = self.groups[chosen].pc;
            if self.groups.len() > 1 {
                // Groups that stand at the same place and wait for nothing else become one.
                let mut joined = self.groups[chosen];
                let mut i = 0;
                self.groups.retain(|group| {
                    let other = i != chosen;
                    i += 1;
                    let join = other && group.pc == pc && matches!(group.wait, Wait::Ready | Wait::Lanes);
                    if join {
                        joined.mask |= group.mask;
                    }
                    other && !join
                });
                self.groups.push(joined);
                chosen = self.groups.len() - 1;
            }
            self.groups[chosen].wait = Wait::Ready;
            let mask = self.groups[chosen].mask;
            let diverged = self.groups.len() > 1;

            macro_rules! pause {
                ($pc:expr, $stop:expr) => {{
                    self.groups[chosen].pc = $pc;
                    return Ok($stop);
                }};
            }
            loop {
                if block.clock >= end {
                    self.turn = if diverged { self.turn.wrapping_add(1) } else { 0 };
                    pause!(pc, Stop::Paused);
                }
                let inst = &code[pc];
                block.clock += 1;
                block.counters.operations[pc] += 1;
                let active = if inst.guard == NO_GUARD {
                    mask
                } else {
                    let p = self.predicates[(inst.guard >> 1) as usize];
                    mask & if inst.guard & 1 == 0 { p } else { !p }
                };
                if inst.fragment != NO_FRAGMENT && active != 0 {
                    self.fragments_touch(&kernel.fragment_uses[inst.fragment as usize])
                        .map_err(|trouble| (pc, trouble))?;
                }
                // Operations on registers; the arms that fall out of the match go to the next operation.
                match &inst.op {
                    Op::Nop => {}
                    Op::Unary32(op, d, a) => {
                        let out = unary32(*op, &self.r32[*a as usize]);
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Binary32(op, d, a, b) => {
                        let out = binary32(*op, &self.r32[*a as usize], &self.r32[*b as usize]);
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Ternary32(op, d, a, b, c) => {
                        let out =
                            ternary32(*op, &self.r32[*a as usize], &self.r32[*b as usize], &self.r32[*c as usize]);
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Unary64(op, d, a) => {
                        let out = unary64(*op, &self.r64[*a as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Binary64(op, d, a, b) => {
                        let out = binary64(*op, &self.r64[*a as usize], &self.r64[*b as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Ternary64(op, d, a, b, c) => {
                        let out =
                            ternary64(*op, &self.r64[*a as usize], &self.r64[*b as usize], &self.r64[*c as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Widen(op, d, a) => {
                        let out = widen(*op, &self.r32[*a as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Narrow(op, d, a) => {
                        let out = narrow(*op, &self.r64[*a as usize]);
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::WideMul(op, d, a, b) => {
                        let out = wide_mul(*op, &self.r32[*a as usize], &self.r32[*b as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::WideMad(op, d, a, b, c) => {
                        let out = wide_mad(*op, &self.r32[*a as usize], &self.r32[*b as usize], &self.r64[*c as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Shift64(op, d, a, b) => {
                        let out = shift64(*op, &self.r64[*a as usize], &self.r32[*b as usize]);
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Lop3(table, d, sources) => {
                        let [a, b, c] = sources.map(|r| &self.r32[r as usize]);
                        let mut out = [0; 32];
                        for lane in 0..32 {
                            out[lane] = lop3(a[lane], b[lane], c[lane], *table);
                        }
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Insert32(d, sources) => {
                        let [value, base, position, length] = sources.map(|r| &self.r32[r as usize]);
                        let mut out = [0; 32];
                        for lane in 0..32 {
                            out[lane] = insert32(value[lane], base[lane], position[lane], length[lane]);
                        }
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Insert64(d, [value, base, position, length]) => {
                        let (value, base) = (&self.r64[*value as usize], &self.r64[*base as usize]);
                        let (position, length) = (&self.r32[*position as usize], &self.r32[*length as usize]);
                        let mut out = [0; 32];
                        for lane in 0..32 {
                            out[lane] = insert64(value[lane], base[lane], position[lane], length[lane]);
                        }
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Directed(kind, round, d, sources) => {
                        let [a, b, c] = sources.map(|r| &self.r32[r as usize]);
                        let mut out = [0; 32];
                        for lane in 0..32 {
                            out[lane] = directed(*kind, *round, a[lane], b[lane], c[lane]);
                        }
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Compare32(op, p, a, b) => {
                        let out = compare32(*op, &self.r32[*a as usize], &self.r32[*b as usize]);
                        put_predicate(&mut self.predicates[*p as usize], out, active);
                    }
                    Op::Compare64(op, p, a, b) => {
                        let out = compare64(*op, &self.r64[*a as usize], &self.r64[*b as usize]);
                        put_predicate(&mut self.predicates[*p as usize], out, active);
                    }
                    Op::Select32(d, a, b, p) => {
                        let p = self.predicates[*p as usize];
                        let (a, b) = (&self.r32[*a as usize], &self.r32[*b as usize]);
                        let mut out = [0; 32];
                        for lane in 0..32 {
                            out[lane] = if p >> lane & 1 == 1 { a[lane] } else { b[lane] };
                        }
                        put(&mut self.r32[*d as usize], &out, active);
                    }
                    Op::Select64(d, a, b, p) => {
                        let p = self.predicates[*p as usize];
                        let (a, b) = (&self.r64[*a as usize], &self.r64[*b as usize]);
                        let mut out = [0; 32];
                        for lane in 0..32 {
                            out[lane] = if p >> lane & 1 == 1 { a[lane] } else { b[lane] };
                        }
                        put(&mut self.r64[*d as usize], &out, active);
                    }
                    Op::Pred(op, d, a, b) => {
                        let (a, b) = (self.predicates[*a as usize], self.predicates[*b as usize]);
                        let out = match op {
                            PredOp::Mov => a,
                            PredOp::Not => !a,
                            PredOp::And => a & b,
                            PredOp::Or => a | b,
                            PredOp::Xor => a ^ b,
                        };
                        put_predicate(&mut self.predicates[*d as usize], out, active);
                    }
                    Op::Branch(target) if active == mask => {
                        pc = *target as usize;
                        if diverged && self.meets(chosen, pc) {
                            self.groups[chosen].pc = pc;
                            continue 'select;
                        }
                        continue;
                    }
                    Op::Branch(target) if active != 0 => {
                        let group = self.groups[chosen];
                        self.groups[chosen] = Group { pc: pc + 1, mask: mask & !active, ..group };
                        self.groups.push(Group { pc: *target as usize, mask: active, ..group });
                        continue 'select;
                    }
                    Op::Branch(_) => {}
                    Op::Exit if active == mask => {
                        self.live &= !active;
                        block.progress += 1;
                        self.groups.remove(chosen);
                        continue 'select;
                    }
                    Op::Exit => {
                        self.live &= !active;
                        self.groups[chosen].mask &= !active;
                        self.groups[chosen].pc = pc + 1;
                        continue 'select;
                    }
                    Op::BranchIndexed(index, targets) => {
                        self.branch_indexed(chosen, pc, active, *index, targets).map_err(|trouble| (pc, trouble))?;
                        continue 'select;
                    }
                    op => {
                        if active != 0 {
                            match self.slow(block, op, inst.statement, chosen, pc, active) {
                                Ok(Flow::Next) => {}
                                Ok(Flow::Again(wait)) => {
                                    block.counters.operations[pc] -= 1;
                                    self.groups[chosen].pc = pc;
                                    self.groups[chosen].wait = wait;
                                    continue 'select;
                                }
                                Ok(Flow::Pause) => pause!(pc + 1, Stop::Paused),
                                Err(trouble) => return Err((pc, trouble)),
                            }
                            if block.preempt {
                                pause!(pc + 1, Stop::Paused);
                            }
                        }
                    }
                }
                pc += 1;
                if diverged && self.meets(chosen, pc) {
                    self.groups[chosen].pc = pc;
                    continue 'select;
                }
            }
        }
    }

    /// Whether the running group, now at `pc`, meets another or should let one behind it catch up.
    fn meets(&self, running: usize, pc: usize) -> bool {
        self.groups.iter().enumerate().any(|(i, group)| {
            i != running
                && match group.wait {
                    Wait::Ready => group.pc <= pc && self.turn == 0 || group.pc == pc,
                    Wait::Lanes => group.pc == pc,
                    _ => false,
                }
        })
    }

    fn branch_indexed(&mut self, chosen: usize, pc: usize, active: u32, index: R, targets: &[u32]) -> Step {
        let group = self.groups.swap_remove(chosen);
        if group.mask & !active != 0 {
            self.groups.push(Group { pc: pc + 1, mask: group.mask & !active, ..group });
        }
        for lane in lanes(active) {
            let index = self.r32[index as usize][lane] as usize;
            let Some(target) = targets.get(index) else {
                let what = format!("index {index} into {} branch targets", targets.len());
                return Err(Trouble::lane(FaultKind::Operand, lane, what));
            };
            match self.groups.iter_mut().find(|g| g.pc == *target as usize && g.wait == Wait::Ready) {
                Some(group) => group.mask |= 1 << lane,
                None => self.groups.push(Group { pc: *target as usize, mask: 1 << lane, ..group }),
            }
        }
        Ok(())
    }

    /// Everything that is more than arithmetic on registers.
    #[inline(never)]
    fn slow(
        &mut self,
        block: &mut Block,
        op: &Op,
        statement: u32,
        chosen: usize,
        pc: usize,
        active: u32,
    ) -> Step<Flow> {
        match op {
            Op::Load(access) => self.load(block, access, active)?,
            Op::Store(access) => self.store(block, access, active)?,
            Op::Atomic(atomic) => self.atomic(block, atomic, active)?,
            Op::Clock(d) => put(&mut self.r64[*d as usize], &[block.clock; 32], active),
            Op::Carry { wide, subtract, d, a, b, carry, read, write } => {
                self.carry(*wide, *subtract, (*d, *a, *b), *carry, (*read, *write), active);
            }
            Op::Trap => return Err(Trouble::lane(FaultKind::Trap, first(active), "the kernel trapped")),
            Op::Yield => return Ok(Flow::Pause),
            Op::IsSpace(p, a, space) => {
                let mut out = 0;
                for lane in lanes(active) {
                    out |= u32::from(space_of(self.r64[*a as usize][lane]).0 == *space) << lane;
                }
                put_predicate(&mut self.predicates[*p as usize], out, active);
            }
            Op::Prefetch(address) => {
                for lane in lanes(active) {
                    let address = self.address(address, lane);
                    if space_of(address).0 == Space::Global && block.global.find(address, 1, block.hint).is_none() {
                        let what = format!("prefetch of {address:#x}: {}", block.global.describe(address));
                        return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
                    }
                }
            }
            Op::Shuffle(shuffle) => {
                if let Some(wait) = self.gather(shuffle.mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.shuffle(shuffle, active)?;
            }
            Op::Vote(mode, d, p, negated, mask) => {
                if let Some(wait) = self.gather(*mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                let p = self.predicates[*p as usize] ^ if *negated { u32::MAX } else { 0 };
                for (group, mask) in by_mask(&self.r32[*mask as usize], active) {
                    let (yes, group) = (p & mask, group & active);
                    let all = |holds: bool| if holds { u32::MAX } else { 0 };
                    let out = match mode {
                        VoteMode::Ballot => {
                            put(&mut self.r32[*d as usize], &[yes; 32], group);
                            continue;
                        }
                        VoteMode::All => all(yes == mask),
                        VoteMode::Any => all(yes != 0),
                        VoteMode::Uniform => all(yes == 0 || yes == mask),
                    };
                    put_predicate(&mut self.predicates[*d as usize], out, group);
                }
            }
            Op::Match { all, wide, d, p, a, mask } => {
                if let Some(wait) = self.gather(*mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                let value = |lane: usize| match wide {
                    true => self.r64[*a as usize][lane],
                    false => self.r32[*a as usize][lane] as u64,
                };
                let mut out = [0; 32];
                let mut holds = 0;
                for lane in lanes(active) {
                    let mask = self.r32[*mask as usize][lane];
                    let same = lanes(mask).filter(|other| value(*other) == value(lane)).fold(0, |m, l| m | 1 << l);
                    out[lane] = if !all || same == mask { same } else { 0 };
                    holds |= u32::from(same == mask) << lane;
                }
                put(&mut self.r32[*d as usize], &out, active);
                if let Some(p) = p {
                    put_predicate(&mut self.predicates[*p as usize], holds, active);
                }
            }
            Op::Redux(op, d, a, mask) => {
                if let Some(wait) = self.gather(*mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                for (group, mask) in by_mask(&self.r32[*mask as usize], active) {
                    let values = lanes(mask).map(|lane| self.r32[*a as usize][lane]);
                    let out = values.reduce(|x, y| match op {
                        ReduxOp::Add => x.wrapping_add(y),
                        ReduxOp::MinU => x.min(y),
                        ReduxOp::MinS => (x as i32).min(y as i32) as u32,
                        ReduxOp::MaxU => x.max(y),
                        ReduxOp::MaxS => (x as i32).max(y as i32) as u32,
                        ReduxOp::And => x & y,
                        ReduxOp::Or => x | y,
                        ReduxOp::Xor => x ^ y,
                    });
                    put(&mut self.r32[*d as usize], &[out.unwrap_or(0); 32], group);
                }
            }
            Op::Elect { d, p, mask } => {
                if let Some(wait) = self.gather(*mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                for (group, mask) in by_mask(&self.r32[*mask as usize], active) {
                    let leader = first(mask);
                    if let Some(d) = d {
                        put(&mut self.r32[*d as usize], &[leader as u32; 32], group);
                    }
                    put_predicate(&mut self.predicates[*p as usize], 1 << leader, group);
                }
            }
            Op::ActiveMask(d) => put(&mut self.r32[*d as usize], &[active; 32], active),
            Op::WarpSync(mask) => {
                if let Some(wait) = self.gather(*mask, active)? {
                    return Ok(Flow::Again(wait));
                }
            }
            Op::NamedBarrier(barrier) => return self.named_barrier(block, barrier, chosen, active),
            Op::Mbarrier(mbarrier) => return self.mbarrier(block, mbarrier, chosen, active),
            Op::Bulk(bulk) => self.bulk(block, bulk, statement, active)?,
            Op::BulkCommit => lanes(active).for_each(|lane| block.commit_copies(self.index, lane)),
            Op::BulkWait { pending } => {
                lanes(active).for_each(|lane| block.wait_copies(self.index, lane, *pending));
            }
            Op::ProxyFence => {
                block.shared.proxy_fence(self.index);
                block.fence_mbarriers(self.index);
            }
            Op::MbarrierInitFence => block.fence_mbarriers(self.index),
            Op::WgmmaFence => {
                if active != u32::MAX {
                    return self.whole(active);
                }
                self.fences += 1;
            }
            Op::WgmmaCommit => {
                if active != u32::MAX {
                    return self.whole(active);
                }
                self.commits.push(self.issued(block));
            }
            Op::WgmmaWait(pending) => {
                if active != u32::MAX {
                    return self.whole(active);
                }
                let groups = self.commits.len().saturating_sub(*pending as usize);
                let products = if groups == 0 { 0 } else { self.commits[groups - 1] };
                let warpgroup = &mut block.warpgroups[self.index / 4];
                if !warpgroup.reached(products) {
                    return Ok(Flow::Again(Wait::Products(products)));
                }
                warpgroup.release(products);
                self.complete = self.complete.max(products);
                block.progress += 1;
            }
            Op::Wgmma(product) => {
                if active != u32::MAX {
                    return self.whole(active);
                }
                wgmma::issue(block, self, product, pc, statement)?;
            }
            Op::Matrix(matrix) => {
                if active != u32::MAX {
                    return self.whole(active);
                }
                self.matrix(block, matrix)?;
            }
            Op::SetMaxRegisters(count, increase) => {
                if active != u32::MAX {
                    return self.whole(active);
                }
                return self.set_max_registers(block, *count, *increase);
            }
            _ => unreachable!("register operations are executed by the loop"),
        }
        Ok(Flow::Next)
    }

    fn issued(&self, block: &Block) -> u64 {
        block.warpgroups[self.index / 4].issued[self.index % 4]
    }

    /// An aligned instruction met by some lanes only: they wait for the others of the warp.
    fn whole(&self, active: u32) -> Step<Flow> {
        if self.live != u32::MAX || self.groups.len() == 1 {
            return Err(self.missing(u32::MAX, active));
        }
        Ok(Flow::Again(Wait::Lanes))
    }

    #[cold]
    fn missing(&self, needed: u32, active: u32) -> Box<Trouble> {
        let missing = needed & !active;
        let lane = first(missing);
        let what = format!(
            "lanes {needed:#x} must execute it together, but only {active:#x} do; {missing:#x} {}",
            if missing & self.live == 0 { "have exited" } else { "go another way or are predicated off" }
        );
        Trouble::lane(FaultKind::Divergence, lane, what)
    }

    /// Checks that all lanes named in the active lanes' masks are here; tells to wait if they may still come.
    fn gather(&self, mask: R, active: u32) -> Step<Option<Wait>> {
        let masks = &self.r32[mask as usize];
        // The usual case: a full warp, every lane with the same full mask.
        if active == u32::MAX && masks.iter().fold(u32::MAX, |all, mask| all & mask) == u32::MAX {
            return Ok(None);
        }
        for lane in lanes(active) {
            let mask = masks[lane];
            if mask >> lane & 1 == 0 {
                let what = format!("the mask {mask:#x} does not name the lane that executes it");
                return Err(Trouble::lane(FaultKind::Divergence, lane, what));
            }
            if mask & !active != 0 {
                if mask & !self.live != 0 || self.groups.len() == 1 {
                    return Err(self.missing(mask, active));
                }
                return Ok(Some(Wait::Lanes));
            }
            if let Some(other) = lanes(mask).find(|other| masks[*other] != mask) {
                let what = format!("the mask is {mask:#x} here and {:#x} in lane {other}", masks[other]);
                return Err(Trouble::lane(FaultKind::Divergence, lane, what));
            }
        }
        Ok(None)
    }

    // Fragments.

    /// An ordinary operation touches registers that products use, or copies of them.
    fn fragments_touch(&mut self, uses: &FragmentUse) -> Step {
        let (complete, now) = (self.complete, self.fences + 1);
        let fragments = &mut self.fragments;
        if let (true, [a], [d]) = (uses.copy, &uses.reads[..], &uses.writes[..]) {
            let (source, target) = (fragments[*a as usize], fragments[*d as usize]);
            if target.until > complete && target.role != Role::Copy {
                return Err(in_flight(target, "written"));
            }
            // ptxas joins both ends of a copy, so what holds for the source holds for the copy.
            let until = if source.role == Role::MatrixA { 0 } else { source.until };
            let touched = if source.touched == ALWAYS { now } else { source.touched };
            fragments[*d as usize] = Fragment { until, role: Role::Copy, touched, ..source };
            return Ok(());
        }
        for r in &uses.reads {
            let fragment = &mut fragments[*r as usize];
            if fragment.until > complete {
                return Err(in_flight(*fragment, "read"));
            }
            fragment.touched = now;
        }
        for r in &uses.writes {
            let fragment = &mut fragments[*r as usize];
            if fragment.until > complete && fragment.role != Role::Copy {
                return Err(in_flight(*fragment, "written"));
            }
            (fragment.until, fragment.touched) = (0, now);
        }
        Ok(())
    }

    /// Checks and marks the registers of a product, number `until` counted from 1.
    pub fn fragments_issue(&mut self, op: &Wgmma, until: u64) -> Step {
        if self.fences == 0 {
            let what = "no wgmma.fence was executed before the first wgmma.mma_async";
            return Err(Trouble::new(FaultKind::MissingFence, what));
        }
        let (complete, now) = (self.complete, self.fences + 1);
        let unfenced = |name: &str| {
            let what = format!("{name} was touched after the last wgmma.fence");
            Err(Trouble::new(FaultKind::MissingFence, what))
        };
        if let OperandA::Registers(registers) = op.a {
            for (i, r) in registers.iter().enumerate() {
                let fragment = &mut self.fragments[*r as usize];
                if fragment.touched == now {
                    return unfenced(&format!("register {i} of matrix A"));
                }
                if fragment.until > complete && fragment.role != Role::MatrixA {
                    return Err(in_flight(*fragment, "used as matrix A"));
                }
                *fragment = Fragment { until, role: Role::MatrixA, ..*fragment };
            }
        }
        for (i, r) in op.d.iter().enumerate() {
            let fragment = &mut self.fragments[*r as usize];
            if fragment.touched == now {
                return unfenced(&format!("accumulator {i}"));
            }
            if fragment.until > complete && (fragment.role == Role::MatrixA || fragment.n != op.n) {
                return Err(in_flight(*fragment, "used as an accumulator of another shape"));
            }
            *fragment = Fragment { until, role: Role::Accumulator, n: op.n, ..*fragment };
        }
        Ok(())
    }

    // Memory.

    #[inline(always)]
    fn address(&self, address: &Address, lane: usize) -> u64 {
        let base = match address.base {
            Base::None => 0,
            Base::R32(r) => self.r32[r as usize][lane] as u64,
            Base::R64(r) => self.r64[r as usize][lane],
        };
        let sum = base.wrapping_add(address.offset as u64);
        if let Base::R32(_) = address.base { sum & 0xffff_ffff } else { sum }
    }

    /// Space and address in it.
    #[inline(always)]
    fn place(&self, space: Space, address: &Address, lane: usize) -> (Space, u64) {
        let address = self.address(address, lane);
        if space == Space::Generic { space_of(address) } else { (space, address) }
    }

    #[inline]
    fn global<'a>(
        &self,
        block: &mut Block<'a>,
        address: u64,
        bytes: usize,
        lane: usize,
        doing: &str,
    ) -> Step<Span<'a>> {
        let Some((hint, span)) = block.global.find(address, bytes as u64, block.hint) else {
            let what = format!("{doing} of {bytes} bytes at global {address:#x}: {}", block.global.describe(address));
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        };
        block.hint = hint;
        if address & (bytes as u64 - 1) != 0 {
            return Err(misaligned(address, bytes, lane, "global"));
        }
        Ok(span)
    }

    fn local_offset(&self, address: u64, bytes: usize, lane: usize) -> Step<usize> {
        let size = self.local.len() as u64 / 32 * 4;
        if address > size || bytes as u64 > size - address {
            let what = format!("{bytes} bytes at local address {address:#x} of {size} bytes");
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        }
        if address & (bytes as u64 - 1) != 0 {
            return Err(misaligned(address, bytes, lane, "local"));
        }
        Ok(lane * size as usize + address as usize)
    }

    #[inline(always)]
    fn load(&mut self, block: &mut Block, access: &Access, active: u32) -> Step {
        let bytes = access.width * access.slots.len();
        for lane in lanes(active) {
            let (space, address) = self.place(access.space, &access.address, lane);
            let mut words = [0u32; 8];
            let part = (address % 4) as usize;
            match space {
                Space::Shared => {
                    let offset = block.shared.offset(address, bytes, bytes, lane)?;
                    block.shared.readable(offset, bytes, Some(lane), "read")?;
                    for (i, word) in words[..bytes.div_ceil(4)].iter_mut().enumerate() {
                        *word = block.shared.word(offset + 4 * i);
                    }
                }
                Space::Global | Space::Generic => {
                    let span = self.global(block, address, bytes, lane, "read")?;
                    let first = ((address - span.base) / 4) as usize;
                    let source = &span.words[first..first + bytes.div_ceil(4)];
                    for (word, source) in words.iter_mut().zip(source) {
                        *word = source.load(Relaxed);
                    }
                }
                Space::Local => {
                    let offset = self.local_offset(address, bytes, lane)? / 4;
                    words[..bytes.div_ceil(4)].copy_from_slice(&self.local[offset..offset + bytes.div_ceil(4)]);
                }
                Space::Param => {
                    let size = block.params.len() as u64;
                    if address > size || bytes as u64 > size - address {
                        let what = format!("{bytes} bytes at parameter offset {address:#x} of {size} bytes");
                        return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
                    }
                    if address & (bytes as u64 - 1) != 0 {
                        return Err(misaligned(address, bytes, lane, "parameter"));
                    }
                    let source = &block.params[address as usize - part..];
                    for (i, byte) in source.iter().take(bytes + part).enumerate() {
                        words[i / 4] |= (*byte as u32) << (8 * (i % 4));
                    }
                }
            }
            words[0] >>= 8 * part as u32;
            if access.width == 4 {
                for (slot, word) in access.slots.iter().zip(words) {
                    match *slot {
                        Slot::R32(r, _) => self.r32[r as usize][lane] = word,
                        slot => self.put_slot(slot, lane, element(&[word; 8], 0, 4, access.signed)),
                    }
                }
            } else {
                for (i, slot) in access.slots.iter().enumerate() {
                    self.put_slot(*slot, lane, element(&words, i, access.width, access.signed));
                }
            }
        }
        block.counters.loaded += (bytes * active.count_ones() as usize) as u64;
        Ok(())
    }

    /// Writes a loaded value, sign- or zero-extended to 64 bits, to a register.
    #[inline]
    fn put_slot(&mut self, slot: Slot, lane: usize, value: u64) {
        match slot {
            Slot::R32(r, 32) => self.r32[r as usize][lane] = value as u32,
            Slot::R32(r, _) => self.r32[r as usize][lane] = value as u32 & 0xffff,
            Slot::R64(r) => self.r64[r as usize][lane] = value,
            Slot::Sink => {}
        }
    }

    #[inline]
    fn get_slot(&self, slot: Slot, lane: usize) -> u64 {
        match slot {
            Slot::R32(r, _) => self.r32[r as usize][lane] as u64,
            Slot::R64(r) => self.r64[r as usize][lane],
            Slot::Sink => 0,
        }
    }

    #[inline(always)]
    fn store(&mut self, block: &mut Block, access: &Access, active: u32) -> Step {
        let bytes = access.width * access.slots.len();
        block.shared.tick();
        for lane in lanes(active) {
            let (space, address) = self.place(access.space, &access.address, lane);
            let mut words = [0u32; 8];
            if bytes < 4 {
                for (i, slot) in access.slots.iter().enumerate() {
                    let mask = if access.width == 1 { 0xff } else { 0xffff };
                    words[0] |= (self.get_slot(*slot, lane) as u32 & mask) << (8 * access.width * i);
                }
            } else {
                for (i, slot) in access.slots.iter().enumerate() {
                    let value = self.get_slot(*slot, lane);
                    match access.width {
                        8 => (words[2 * i], words[2 * i + 1]) = (value as u32, (value >> 32) as u32),
                        4 => words[i] = value as u32,
                        2 => words[i / 2] |= (value as u32 & 0xffff) << (16 * (i % 2)),
                        _ => words[i / 4] |= (value as u32 & 0xff) << (8 * (i % 4)),
                    }
                }
            }
            self.store_words(block, space, address, bytes, &words, lane)?;
        }
        block.counters.stored += (bytes * active.count_ones() as usize) as u64;
        block.progress += 1;
        Ok(())
    }

    /// Stores `bytes` (1, 2, or whole words) of one lane.
    #[inline]
    fn store_words(
        &mut self,
        block: &mut Block,
        space: Space,
        address: u64,
        bytes: usize,
        words: &[u32; 8],
        lane: usize,
    ) -> Step {
        match space {
            Space::Shared => {
                let offset = block.shared.offset(address, bytes, bytes, lane)?;
                block.shared.writable(offset, bytes, Some(lane), "store")?;
                block.check_products(offset, bytes, "store")?;
                block.shared.store(offset, bytes, words, self.index);
            }
            Space::Global | Space::Generic => {
                let span = self.global(block, address, bytes, lane, "store")?;
                if bytes < 4 {
                    store_part(span.word(address), (address % 4) as usize, bytes, words[0]);
                } else {
                    let first = ((address - span.base) / 4) as usize;
                    for (target, word) in span.words[first..first + bytes / 4].iter().zip(words) {
                        target.store(*word, Relaxed);
                    }
                }
            }
            Space::Local => {
                let offset = self.local_offset(address, bytes, lane)?;
                if bytes < 4 {
                    let (shift, mask) = (8 * (offset % 4), if bytes == 1 { 0xff } else { 0xffff });
                    let word = &mut self.local[offset / 4];
                    *word = *word & !(mask << shift) | (words[0] & mask) << shift;
                } else {
                    self.local[offset / 4..(offset + bytes) / 4].copy_from_slice(&words[..bytes / 4]);
                }
            }
            Space::Param => {
                return Err(Trouble::lane(FaultKind::OutOfBounds, lane, "store to the read-only parameter space"));
            }
        }
        Ok(())
    }

    fn atomic(&mut self, block: &mut Block, atomic: &Atomic, active: u32) -> Step {
        block.shared.tick();
        let width = atomic.width;
        let total = width * atomic.b.len();
        for lane in lanes(active) {
            let (space, base) = self.place(atomic.space, &atomic.address, lane);
            if base & (total as u64 - 1) != 0 {
                return Err(misaligned(base, total, lane, space.name()));
            }
            for i in 0..atomic.b.len() {
                let address = base + (i * width) as u64;
                let b = self.get_slot(atomic.b[i], lane);
                let c = atomic.c.map_or(0, |slot| self.get_slot(slot, lane));
                let new = |old: u64| combine(atomic.op, atomic.kind, width, old, b, c);
                let old = match space {
                    Space::Shared => {
                        let offset = block.shared.offset(address, width, width, lane)?;
                        block.shared.readable(offset, width, Some(lane), "atomic")?;
                        block.shared.writable(offset, width, Some(lane), "atomic")?;
                        block.check_products(offset, width, "atomic")?;
                        let word = block.shared.word(offset) as u64 >> (8 * (offset % 4));
                        let old = match width {
                            8 => word | (block.shared.word(offset + 4) as u64) << 32,
                            2 => word & 0xffff,
                            _ => word,
                        };
                        let value = new(old);
                        let words = [value as u32, (value >> 32) as u32, 0, 0, 0, 0, 0, 0];
                        block.shared.store(offset, width, &words, self.index);
                        old
                    }
                    Space::Global | Space::Generic => {
                        let span = self.global(block, address, width, lane, "atomic")?;
                        let word = span.word(address);
                        match width {
                            8 => {
                                let guard = block.global.wide.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                                let high = span.word(address + 4);
                                let old = word.load(Relaxed) as u64 | (high.load(Relaxed) as u64) << 32;
                                let value = new(old);
                                word.store(value as u32, Relaxed);
                                high.store((value >> 32) as u32, Relaxed);
                                drop(guard);
                                old
                            }
                            _ => {
                                let shift = 8 * (address % 4) as u32;
                                let mask = if width == 2 { 0xffffu32 } else { u32::MAX };
                                let update = |whole: u32| {
                                    let value = new((whole >> shift & mask) as u64) as u32;
                                    Some(whole & !(mask << shift) | (value & mask) << shift)
                                };
                                let whole = word.fetch_update(Relaxed, Relaxed, update).unwrap_or_else(|old| old);
                                (whole >> shift & mask) as u64
                            }
                        }
                    }
                    Space::Local | Space::Param => {
                        return Err(Trouble::lane(
                            FaultKind::OutOfBounds,
                            lane,
                            "atomic outside global and shared memory",
                        ));
                    }
                };
                if let Some(slot) = atomic.old.get(i) {
                    self.put_slot(*slot, lane, old);
                }
            }
        }
        block.progress += 1;
        Ok(())
    }

    fn carry(
        &mut self,
        wide: bool,
        subtract: bool,
        regs: (R, R, R),
        carry: R,
        (read, write): (bool, bool),
        active: u32,
    ) {
        let (d, a, b) = regs;
        let carry_in = if read { self.predicates[carry as usize] } else { 0 };
        let mut carry_out = 0;
        for lane in lanes(active) {
            let carried = carry_in >> lane & 1 == 1;
            let (out, overflow);
            if wide {
                let (a, b) = (self.r64[a as usize][lane], self.r64[b as usize][lane]);
                (out, overflow) = add_carry(a as u128, b as u128, carried, subtract, 64);
                self.r64[d as usize][lane] = out as u64;
            } else {
                let (a, b) = (self.r32[a as usize][lane], self.r32[b as usize][lane]);
                (out, overflow) = add_carry(a as u128, b as u128, carried, subtract, 32);
                self.r32[d as usize][lane] = out as u32;
            }
            carry_out |= u32::from(overflow) << lane;
        }
        if write {
            put_predicate(&mut self.predicates[carry as usize], carry_out, active);
        }
    }

    fn shuffle(&mut self, shuffle: &Shuffle, active: u32) -> Step {
        let a = self.r32[shuffle.a as usize];
        let (b, c) = (&self.r32[shuffle.b as usize], &self.r32[shuffle.c as usize]);
        let masks = &self.r32[shuffle.mask as usize];
        let mut out = a;
        let mut in_range = 0;
        for lane in lanes(active) {
            let (by, segment, clamp) = ((b[lane] & 31) as i32, c[lane] >> 8 & 31, c[lane] & 31);
            let here = lane as i32;
            let low = (lane as u32 & segment) as i32;
            let limit = low | (clamp & !segment) as i32;
            let (source, inside) = match shuffle.mode {
                ShuffleMode::Up => (here - by, here - by >= limit),
                ShuffleMode::Down => (here + by, here + by <= limit),
                ShuffleMode::Butterfly => (here ^ by, here ^ by <= limit),
                ShuffleMode::Index => {
                    let source = low | (by as u32 & !segment) as i32;
                    (source, source <= limit)
                }
            };
            let source = if inside { source as usize } else { lane };
            if masks[lane] >> source & 1 == 0 {
                let what = format!("it reads lane {source}, which the mask {:#x} does not name", masks[lane]);
                return Err(Trouble::lane(FaultKind::Divergence, lane, what));
            }
            out[lane] = a[source];
            in_range |= u32::from(inside) << lane;
        }
        put(&mut self.r32[shuffle.d as usize], &out, active);
        if let Some(p) = shuffle.p {
            put_predicate(&mut self.predicates[p as usize], in_range, active);
        }
        Ok(())
    }

    // Barriers and copies.

    fn named_barrier(&mut self, block: &mut Block, barrier: &NamedBarrier, chosen: usize, active: u32) -> Step<Flow> {
        if let Some((id, round)) = self.groups[chosen].arrived {
            // Woken: the round is complete.
            if block.named[id as usize].round <= round {
                return Ok(Flow::Again(Wait::Named { id, round }));
            }
            self.groups[chosen].arrived = None;
            let (votes, voters) = block.named[id as usize].last_votes;
            let all = |holds: bool| if holds { u32::MAX } else { 0 };
            match barrier.kind {
                BarrierKind::Popc => put(&mut self.r32[barrier.d as usize], &[votes; 32], active),
                BarrierKind::And => {
                    put_predicate(&mut self.predicates[barrier.d as usize], all(votes == voters), active);
                }
                BarrierKind::Or => put_predicate(&mut self.predicates[barrier.d as usize], all(votes > 0), active),
                BarrierKind::Sync | BarrierKind::Arrive => {}
            }
            return Ok(Flow::Next);
        }
        if barrier.aligned && active != self.live {
            if self.groups.len() == 1 {
                return Err(self.missing(self.live, active));
            }
            return Ok(Flow::Again(Wait::Lanes));
        }
        let lane = first(active);
        let id = self.r32[barrier.id as usize][lane];
        let threads = barrier.count.map(|count| self.r32[count as usize][lane]);
        for other in lanes(active) {
            let same = self.r32[barrier.id as usize][other] == id
                && barrier.count.map(|count| self.r32[count as usize][other]) == threads;
            if !same {
                let what = "barrier number or thread count differs between lanes of the warp";
                return Err(Trouble::lane(FaultKind::Divergence, other, what));
            }
        }
        let p = self.predicates[barrier.p as usize] ^ if barrier.p_negated { u32::MAX } else { 0 };
        let arriving = if barrier.aligned { 32 } else { active.count_ones() };
        // Lanes that do not exist do not vote; an `and` must not fail for them.
        let absent = if barrier.aligned { 32 - active.count_ones() } else { 0 };
        let votes = (p & active).count_ones() + if barrier.kind == BarrierKind::And { absent } else { 0 };
        let round = block.named_arrive(id, threads, arriving, votes)?;
        if barrier.kind == BarrierKind::Arrive {
            return Ok(Flow::Next);
        }
        self.groups[chosen].arrived = Some((id, round));
        Ok(Flow::Again(Wait::Named { id, round }))
    }

    /// Offset of an mbarrier object.
    fn mbarrier_offset(&self, block: &Block, space: Space, address: &Address, lane: usize) -> Step<usize> {
        let (found, address) = self.place(space, address, lane);
        if found != Space::Shared {
            let what = format!("an mbarrier at {address:#x}, which is not in shared memory");
            return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
        }
        block.shared.offset(address, 8, 8, lane)
    }

    fn mbarrier(&mut self, block: &mut Block, mbarrier: &Mbarrier, chosen: usize, active: u32) -> Step<Flow> {
        if let MbarrierKind::Test { p, phase, blocking } = mbarrier.kind {
            return self.mbarrier_test(block, mbarrier, p, phase, blocking, chosen, active);
        }
        for lane in lanes(active) {
            let offset = self.mbarrier_offset(block, mbarrier.space, &mbarrier.address, lane)?;
            let value = |r: R| self.r32[r as usize][lane];
            match &mbarrier.kind {
                MbarrierKind::Init { count } => block.mbarrier_init(offset, value(*count), self.index, lane)?,
                MbarrierKind::Invalidate => block.mbarrier_invalidate(offset, lane)?,
                MbarrierKind::ExpectTx { bytes } => block.expect_bytes(offset, value(*bytes) as i64, lane)?,
                MbarrierKind::CompleteTx { bytes } => block.expect_bytes(offset, -(value(*bytes) as i64), lane)?,
                MbarrierKind::Arrive { count, expect, drop, state } => {
                    let (count, expect) = (count.map_or(1, value), expect.map_or(0, value));
                    let phase = block.arrive(offset, count, expect, *drop, lane)?;
                    if let Some(state) = state {
                        self.r64[*state as usize][lane] = phase;
                    }
                }
                MbarrierKind::Test { .. } => {}
            }
        }
        Ok(Flow::Next)
    }

    #[allow(clippy::too_many_arguments)]
    fn mbarrier_test(
        &mut self,
        block: &mut Block,
        mbarrier: &Mbarrier,
        p: R,
        phase: Phase,
        blocking: bool,
        chosen: usize,
        active: u32,
    ) -> Step<Flow> {
        let mut complete = 0;
        let mut wait = None;
        for lane in lanes(active) {
            let offset = self.mbarrier_offset(block, mbarrier.space, &mbarrier.address, lane)?;
            let current = block.mbarrier(offset, lane)?.phase;
            let (done, found) = match phase {
                Phase::Parity(r) => {
                    let parity = self.r32[r as usize][lane];
                    if parity > 1 {
                        let what = format!("parity {parity}: it must be 0 or 1");
                        return Err(Trouble::lane(FaultKind::Operand, lane, what));
                    }
                    (current & 1 != parity as u64, Wait::Mbarrier { offset, parity: Some(parity), phase: 0 })
                }
                Phase::State(r) => {
                    let phase = self.r64[r as usize][lane];
                    (current > phase, Wait::Mbarrier { offset, parity: None, phase })
                }
            };
            if done {
                complete |= 1 << lane;
            } else {
                wait.get_or_insert(found);
            }
        }
        let timeout = std::mem::take(&mut self.groups[chosen].timeout);
        if let Some(wait) = wait
            && blocking
            && !timeout
        {
            return Ok(Flow::Again(wait));
        }
        put_predicate(&mut self.predicates[p as usize], complete, active);
        // A loop around a test that fails must not keep the others from running.
        Ok(if wait.is_some() { Flow::Pause } else { Flow::Next })
    }

    fn bulk(&mut self, block: &mut Block, bulk: &Bulk, statement: u32, active: u32) -> Step {
        for lane in lanes(active) {
            let bytes = self.r32[bulk.bytes as usize][lane] as usize;
            let (_, shared) = self.place(Space::Shared, &bulk.shared, lane);
            let global = self.address(&bulk.global, lane);
            if !bytes.is_multiple_of(16) {
                let what = format!("a bulk copy of {bytes} bytes: it must be a multiple of 16");
                return Err(Trouble::lane(FaultKind::BulkCopy, lane, what));
            }
            let offset = block.shared.offset(shared, bytes, 16, lane)?;
            let Some((hint, _)) = block.global.find(global, bytes as u64, block.hint) else {
                let what =
                    format!("bulk copy of {bytes} bytes at global {global:#x}: {}", block.global.describe(global));
                return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
            };
            block.hint = hint;
            if !global.is_multiple_of(16) {
                return Err(misaligned(global, 16, lane, "global"));
            }
            match &bulk.barrier {
                Some(barrier) => {
                    let barrier = self.mbarrier_offset(block, Space::Shared, barrier, lane)?;
                    block.copy_in(offset, global, bytes, barrier, self.index, lane, statement)?;
                }
                None => block.copy_out(offset, global, bytes, self.index, lane, statement)?,
            }
        }
        Ok(())
    }

    /// `ldmatrix` and `stmatrix`: lanes 8i to 8i + 7 give the row addresses of matrix i.
    fn matrix(&mut self, block: &mut Block, matrix: &Matrix) -> Step {
        block.shared.tick();
        let mut rows = [[0u32; 4]; 32];
        if matrix.store {
            for (i, r) in matrix.registers.iter().enumerate() {
                let values = self.r32[*r as usize];
                for (lane, value) in values.iter().enumerate() {
                    for half in 0..2 {
                        let (row, column) = (lane / 4, 2 * (lane % 4) + half);
                        let (row, column) = if matrix.transpose { (column, row) } else { (row, column) };
                        rows[8 * i + row][column / 2] |= (value >> (16 * half) & 0xffff) << (16 * (column % 2));
                    }
                }
            }
        }
        for (lane, row) in rows.iter_mut().enumerate().take(8 * matrix.registers.len()) {
            let (space, address) = self.place(matrix.space, &matrix.address, lane);
            if space != Space::Shared {
                let what = format!("a matrix row at {address:#x}, which is not in shared memory");
                return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
            }
            let offset = block.shared.offset(address, 16, 16, lane)?;
            if matrix.store {
                let words = [row[0], row[1], row[2], row[3], 0, 0, 0, 0];
                self.store_words(block, Space::Shared, address, 16, &words, lane)?;
            } else {
                block.shared.readable(offset, 16, Some(lane), "matrix read")?;
                *row = block.shared.chunk(offset);
            }
        }
        if matrix.store {
            block.progress += 1;
            return Ok(());
        }
        for (i, r) in matrix.registers.iter().enumerate() {
            let values = &mut self.r32[*r as usize];
            for (lane, value) in values.iter_mut().enumerate() {
                *value = 0;
                for half in 0..2 {
                    let (row, column) = (lane / 4, 2 * (lane % 4) + half);
                    let (row, column) = if matrix.transpose { (column, row) } else { (row, column) };
                    *value |= (rows[8 * i + row][column / 2] >> (16 * (column % 2)) & 0xffff) << (16 * half);
                }
            }
        }
        Ok(())
    }

    fn set_max_registers(&mut self, block: &mut Block, count: u32, increase: bool) -> Step<Flow> {
        let Some(free) = block.free_registers else {
            let what = "setmaxnreg in a kernel without .maxntid or .reqntid: ptxas drops it (C7508)";
            return Err(Trouble::new(FaultKind::Operand, what));
        };
        let held = self.registers;
        if (increase && count < held) || (!increase && count > held) {
            let what =
                format!("{count} registers, from {held}: not a{}", if increase { "n increase" } else { " decrease" });
            return Err(Trouble::new(FaultKind::Operand, what));
        }
        if increase && free < count - held {
            return Ok(Flow::Again(Wait::Registers(count - held)));
        }
        block.free_registers = Some(free + held - count);
        self.registers = count;
        block.progress += 1;
        Ok(Flow::Next)
    }
}

#[cold]
fn in_flight(fragment: Fragment, doing: &str) -> Box<Trouble> {
    let what = match fragment.role {
        Role::MatrixA => "a register of matrix A",
        Role::Accumulator => "an accumulator",
        Role::Copy => "a copy of an accumulator",
    };
    Trouble::new(
        FaultKind::Fragment,
        format!("{what} of a wgmma in flight is {doing}: no wgmma.wait_group released it yet"),
    )
}

/// Lanes of a mask, from the lowest.
#[inline(always)]
fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let lane = mask.trailing_zeros() as usize;
        mask &= mask - 1;
        Some(lane)
    })
}

fn first(mask: u32) -> usize {
    mask.trailing_zeros() as usize & 31
}

/// Active lanes by the member mask they name: (lanes, mask).
fn by_mask(masks: &Lanes<u32>, active: u32) -> Vec<(u32, u32)> {
    let mut out: Vec<(u32, u32)> = Vec::new();
    for lane in lanes(active) {
        match out.iter_mut().find(|(_, mask)| *mask == masks[lane]) {
            Some((group, _)) => *group |= 1 << lane,
            None => out.push((1 << lane, masks[lane])),
        }
    }
    out
}

/// Writes the active lanes.
#[inline(always)]
fn put<T: Copy>(to: &mut Lanes<T>, from: &Lanes<T>, active: u32) {
    if active == u32::MAX {
        *to = *from;
    } else {
        for lane in 0..32 {
            to[lane] = if active >> lane & 1 == 1 { from[lane] } else { to[lane] };
        }
    }
}

#[inline(always)]
fn put_predicate(to: &mut u32, from: u32, active: u32) {
    *to = *to & !active | from & active;
}

/// Space and address in it of a generic address.
#[inline(always)]
pub(crate) fn space_of(address: u64) -> (Space, u64) {
    const SIZE: u64 = 1 << 32;
    if address.wrapping_sub(SHARED_WINDOW) < SIZE {
        (Space::Shared, address - SHARED_WINDOW)
    } else if address.wrapping_sub(LOCAL_WINDOW) < SIZE {
        (Space::Local, address - LOCAL_WINDOW)
    } else if address.wrapping_sub(PARAM_WINDOW) < SIZE {
        (Space::Param, address - PARAM_WINDOW)
    } else {
        (Space::Global, address)
    }
}

/// Element `i` of loaded words, extended to 64 bits.
#[inline]
fn element(words: &[u32; 8], i: usize, width: usize, signed: bool) -> u64 {
    match width {
        8 => words[2 * i] as u64 | (words[2 * i + 1] as u64) << 32,
        4 if signed => words[i] as i32 as i64 as u64,
        4 => words[i] as u64,
        2 => {
            let value = words[i / 2] >> (16 * (i % 2)) & 0xffff;
            if signed { value as i16 as i64 as u64 } else { value as u64 }
        }
        _ => {
            let value = words[i / 4] >> (8 * (i % 4)) & 0xff;
            if signed { value as i8 as i64 as u64 } else { value as u64 }
        }
    }
}

/// Sum or difference with a carry, and the carry out; a subtraction carries its borrow.
fn add_carry(a: u128, b: u128, carry: bool, subtract: bool, bits: u32) -> (u128, bool) {
    let mask = (1u128 << bits) - 1;
    if subtract {
        let b = b + carry as u128;
        (a.wrapping_sub(b) & mask, a < b)
    } else {
        let sum = a + b + carry as u128;
        (sum & mask, sum > mask)
    }
}

/// New value of an atomic operation.
fn combine(op: AtomicOp, kind: AtomicType, width: usize, old: u64, b: u64, c: u64) -> u64 {
    use AtomicOp::*;
    match op {
        Exchange => return b,
        CompareSwap => {
            let mask = if width == 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
            return if old & mask == b & mask { c } else { old };
        }
        And => return old & b,
        Or => return old | b,
        Xor => return old ^ b,
        Inc => return if old >= b { 0 } else { old + 1 },
        Dec => return if old == 0 || old > b { b } else { old - 1 },
        Add | Min | Max => {}
    }
    let lane32 = |row: Binary32| binary32(row, &[old as u32; 32], &[b as u32; 32])[0] as u64;
    let lane64 = |row: Binary64| binary64(row, &[old; 32], &[b; 32])[0];
    match (kind, op, width) {
        (AtomicType::Unsigned | AtomicType::Signed, Add, 8) => old.wrapping_add(b),
        (AtomicType::Unsigned | AtomicType::Signed, Add, _) => (old as u32).wrapping_add(b as u32) as u64,
        (AtomicType::Unsigned, Min, _) => old.min(b),
        (AtomicType::Unsigned, _, _) => old.max(b),
        (AtomicType::Signed, Min, 8) => lane64(Binary64::MinS),
        (AtomicType::Signed, _, 8) => lane64(Binary64::MaxS),
        (AtomicType::Signed, Min, _) => lane32(Binary32::MinS),
        (AtomicType::Signed, _, _) => lane32(Binary32::MaxS),
        (AtomicType::F64, Add, _) => lane64(Binary64::AddF64),
        (AtomicType::F64, Min, _) => lane64(Binary64::MinF64),
        (AtomicType::F64, _, _) => lane64(Binary64::MaxF64),
        (AtomicType::F32, Add, _) => lane32(Binary32::AddF32),
        (AtomicType::F32, Min, _) => lane32(Binary32::MinF32),
        (AtomicType::F32, _, _) => lane32(Binary32::MaxF32),
        (AtomicType::F16, Add, _) => lane32(Binary32::AddF16),
        (AtomicType::F16, Min, _) => lane32(Binary32::MinF16),
        (AtomicType::F16, _, _) => lane32(Binary32::MaxF16),
        (AtomicType::Bf16, Add, _) => lane32(Binary32::AddBf16),
        (AtomicType::Bf16, Min, _) => lane32(Binary32::MinBf16),
        (AtomicType::Bf16, _, _) => lane32(Binary32::MaxBf16),
        (AtomicType::F16x2, Add, _) => lane32(Binary32::AddF16x2),
        (AtomicType::F16x2, Min, _) => lane32(Binary32::MinF16x2),
        (AtomicType::F16x2, _, _) => lane32(Binary32::MaxF16x2),
        (AtomicType::Bf16x2, Add, _) => lane32(Binary32::AddBf16x2),
        (AtomicType::Bf16x2, Min, _) => lane32(Binary32::MinBf16x2),
        (AtomicType::Bf16x2, _, _) => lane32(Binary32::MaxBf16x2),
    }
}
