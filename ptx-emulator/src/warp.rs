//! A warp: its registers, its groups of lanes, and the loop that executes operations.
//!
//! Lanes that go the same way form a group with one program counter. The group with the lowest one runs first, so that groups
//! meet again where their ways join; an instruction that needs lanes of other groups makes its group wait for them. A waiting
//! group never holds another up for ever: when nothing else in the block can run, the other groups may overtake it.

use crate::alu::*;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;
use crate::wgmma;

mod memory;
mod sync;

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
    /// Operations of the turns that ended while lanes went different ways.
    apart: u64,
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

/// Operations for which a group of lanes may hold up the others.
const PATIENCE: u64 = 20_000;

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
            apart: 0,
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
        (self.fences, self.complete, self.turn, self.apart) = (0, 0, 0, 0);
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
                // Groups that stand at the same place and wait for nothing else become one. Those that wait for an mbarrier there ask
                // again together: else one might go on, come round, and complete the phase after, which the others take for none.
                let mut joined = self.groups[chosen];
                let mut i = 0;
                self.groups.retain(|group| {
                    let other = i != chosen;
                    i += 1;
                    let join = other
                        && group.pc == pc
                        && matches!(group.wait, Wait::Ready | Wait::Lanes | Wait::Mbarrier { .. });
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
                    self.apart = if diverged { self.apart + budget } else { 0 };
                    if self.apart >= PATIENCE {
                        (self.turn, self.apart) = (self.turn.wrapping_add(1), 0);
                    } else if !diverged {
                        self.turn = 0;
                    }
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
                    Wait::Lanes | Wait::Mbarrier { .. } => group.pc == pc,
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
            Op::Load(access) => self.load(block, access, statement, active)?,
            Op::Store(access) => self.store(block, access, statement, active)?,
            Op::Atomic(atomic) => self.atomic(block, atomic, statement, active)?,
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
                if let Some(wait) = self.meet(block, shuffle.mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.shuffle(shuffle, active)?;
            }
            Op::Vote(mode, d, p, negated, mask) => {
                if let Some(wait) = self.meet(block, *mask, active)? {
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
                if let Some(wait) = self.meet(block, *mask, active)? {
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
                if let Some(wait) = self.meet(block, *mask, active)? {
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
                if let Some(wait) = self.meet(block, *mask, active)? {
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
                if let Some(wait) = self.meet(block, *mask, active)? {
                    return Ok(Flow::Again(wait));
                }
            }
            Op::NamedBarrier(barrier) => return self.named_barrier(block, barrier, statement, chosen, active),
            Op::Mbarrier(mbarrier) => return self.mbarrier(block, mbarrier, statement, chosen, active),
            Op::Bulk(bulk) => self.bulk(block, bulk, statement, active)?,
            Op::BulkCommit => lanes(active).for_each(|lane| block.commit_copies(self.index, lane)),
            Op::BulkWait { pending } => {
                lanes(active).for_each(|lane| block.wait_copies(self.index, lane, *pending));
            }
            Op::AsyncCopy(copy) => self.async_copy(block, copy, statement, active)?,
            Op::AsyncCommit => lanes(active).for_each(|lane| block.async_copies(self.index, lane).commit()),
            Op::AsyncWait { pending } => {
                lanes(active).for_each(|lane| block.wait_async_copies(self.index, lane, *pending));
            }
            Op::ProxyFence => {
                block.shared.clocks.fence(self.index, active);
                block.fence_mbarriers(self.index);
            }
            Op::MbarrierInitFence => block.fence_mbarriers(self.index),
            Op::WgmmaFence => {
                if let Some(wait) = self.whole(block, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.fences += 1;
            }
            Op::WgmmaCommit => {
                if let Some(wait) = self.whole(block, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.commits.push(self.issued(block));
            }
            Op::WgmmaWait(pending) => {
                if let Some(wait) = self.whole(block, active)? {
                    return Ok(Flow::Again(wait));
                }
                let groups = self.commits.len().saturating_sub(*pending as usize);
                let products = if groups == 0 { 0 } else { self.commits[groups - 1] };
                let warpgroup = &mut block.warpgroups[self.index / 4];
                if !warpgroup.reached(products) {
                    return Ok(Flow::Again(Wait::Products(products)));
                }
                warpgroup.release(self.index, products, block.shared.clocks.now(self.index));
                self.complete = self.complete.max(products);
                block.progress += 1;
            }
            Op::Wgmma(product) => {
                if let Some(wait) = self.whole(block, active)? {
                    return Ok(Flow::Again(wait));
                }
                wgmma::issue(block, self, product, pc, statement)?;
            }
            Op::Matrix(matrix) => {
                if let Some(wait) = self.whole(block, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.matrix(block, matrix, statement)?;
            }
            Op::SetMaxRegisters(count, increase) => {
                if let Some(wait) = self.whole(block, active)? {
                    return Ok(Flow::Again(wait));
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
