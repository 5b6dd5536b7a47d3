//! A warp: its registers, its groups of lanes, and the loop that executes operations.
//!
//! Lanes that go the same way form a group with one program counter. The group with the lowest one
//! runs first, so that groups meet again where their ways join:
//!
//! ```text
//! pc 1   @p bra 4     lanes 0 to 31 part here
//! pc 2   ...          lanes 16 to 31 run first
//! pc 3   ...
//! pc 4   ...          lanes 0 to 15 wait here until the others come, then all go on as one group
//! ```
//!
//! An instruction that needs lanes of other groups makes its group wait for them. A waiting group
//! does not hold others up for ever: they may overtake it when nothing else in the block can run.

use crate::alu::*;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::*;
use crate::tensor_core::mma_sync::MatricesA;
use crate::tensor_core::wgmma;

mod barriers;
mod copies;
mod lanes;
mod memory;

/// What a group waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// It waits for nothing, and can run.
    Ready,
    /// It waits for other lanes, to execute an instruction together.
    Lanes,
    /// It waits for a phase of the mbarrier at an offset, named by its parity or else its number.
    Mbarrier { offset: usize, parity: Option<u32>, phase: u64 },
    /// It waits for a round of a named barrier.
    Named { id: u32, round: u64 },
    /// It waits until all warps of its warpgroup have issued so many products.
    Products(u64),
    /// It waits for so many more registers a thread, which other warps give back.
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
    /// The next blocking test of an mbarrier gives up instead of waiting.
    pub timeout: bool,
}

/// A warp of a block.
pub(crate) struct Warp {
    /// Its number in the block.
    pub index: usize,
    /// The three register files. A predicate has one bit for each lane.
    pub predicates: Vec<u32>,
    pub r32: Vec<Lanes<u32>>,
    pub r64: Vec<Lanes<u64>>,
    pub groups: Vec<Group>,
    /// The lanes that exist and have not exited.
    pub live: u32,
    /// Which of several ready groups runs. It moves on when one takes too long.
    turn: usize,
    /// How many operations the turns had that ended while lanes went different ways.
    apart: u64,
    /// Local memory, that of one lane after that of the other.
    local: Vec<u32>,
    /// What the warp knows of its products in flight.
    pub products: wgmma::Registers,
    /// Matrices of `mma.sync` that are decoded already.
    pub matrices_a: MatricesA,
    /// How many registers a thread has, when they are counted.
    pub registers: u32,
}

/// What a warp needs to know when it starts.
pub(crate) struct Start<'a> {
    pub kernel: &'a Kernel,
    /// Blocks of the grid, threads of a block, and the index of this block.
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub index: [u32; 3],
    /// Bytes of dynamic shared memory, and of all shared memory.
    pub dynamic_shared: u32,
    pub shared_bytes: u32,
    /// The multiprocessor that the block runs on, and how many there are.
    pub multiprocessor: (u32, u32),
}

/// For so many operations a group of lanes may hold up the others.
const PATIENCE: u64 = 20_000;

/// What a register holds that nobody wrote. It is a NaN in every format.
const POISON: u32 = 0xffff_ffff;

/// Why a warp stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Every lane has exited.
    Done,
    /// Every group waits.
    Blocked,
    /// It can go on, but other warps should run first.
    Paused,
}

/// What an operation tells the loop to do.
pub(crate) enum Flow {
    /// Go on with the next operation.
    Next,
    /// Wait, then execute the same operation again.
    Again(Wait),
    /// Go on when other warps had a turn.
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
            products: wgmma::Registers::new(kernel),
            matrices_a: MatricesA::new(),
            registers: 0,
        }
    }

    /// Makes everything as at the entry of a kernel.
    pub fn start(&mut self, start: &Start) {
        let kernel = start.kernel;
        self.predicates.fill(0);
        self.r32.fill([POISON; 32]);
        self.r64.fill([u64::MAX; 32]);
        self.local.fill(POISON);
        self.products.reset(kernel);
        (self.turn, self.apart) = (0, 0);
        self.predicates[kernel.true_predicate as usize] = u32::MAX;
        for (r, value) in &kernel.constants32 {
            self.r32[*r as usize] = [*value; 32];
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

    /// Whether some group can run. With `overtake`, groups may run that are behind one that waits.
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

    /// The group to run: that with the lowest program counter, or another whose turn it is.
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
                // A group waits at an mbarrier, and the others wait where their ways join.
                return None;
            }
        }
        (!ready.is_empty()).then(|| ready[self.turn % ready.len()])
    }

    /// Runs until the warp blocks, ends or pauses, or has executed about `budget` operations.
    pub fn run(&mut self, block: &mut Block, budget: u64, overtake: bool) -> Result<Stop, (usize, Box<Trouble>)> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("lzcnt")
        {
            // SAFETY: the CPU was just found to have the features that the function is compiled
            // for.
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
                // Groups at the same place become one. Those that wait for an mbarrier there ask
                // again together. Else one might go on alone, come round a ring, and complete the
                // next phase too. By the parity the others would not see that, and would wait for
                // ever.
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
                    self.products
                        .touch(&kernel.fragment_uses[inst.fragment as usize])
                        .map_err(|trouble| (pc, trouble))?;
                }
                // Operations on registers are executed here. Arms that end go on to the next
                // operation.
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

    /// Whether the running group, now at `pc`, meets another, or should let one behind it catch up.
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

    /// `brx.idx`: each lane goes to the target that its index names.
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

    /// Executes what is more than arithmetic on registers.
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
            Op::Vote(vote) => {
                if let Some(wait) = self.meet(block, vote.mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.vote(vote, active);
            }
            Op::Match(op) => {
                if let Some(wait) = self.meet(block, op.mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.match_lanes(op, active);
            }
            Op::Redux(op, d, a, mask) => {
                if let Some(wait) = self.meet(block, *mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.reduce(*op, *d, *a, *mask, active);
            }
            Op::Elect { d, p, mask } => {
                if let Some(wait) = self.meet(block, *mask, active)? {
                    return Ok(Flow::Again(wait));
                }
                self.elect(*d, *p, *mask, active);
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
            Op::BulkCommit => lanes(active).for_each(|lane| block.commit_bulk(self.index, lane)),
            Op::BulkWait { pending } => {
                lanes(active).for_each(|lane| block.wait_bulk(self.index, lane, *pending));
            }
            Op::AsyncCopy(copy) => self.async_copy(block, copy, statement, active)?,
            Op::AsyncCommit => lanes(active).for_each(|lane| block.thread_copies(self.index, lane).commit()),
            Op::AsyncWait { pending } => {
                lanes(active).for_each(|lane| block.wait_thread_copies(self.index, lane, *pending));
            }
            Op::ProxyFence => {
                block.shared.clocks.fence(self.index, active);
                block.fence_mbarriers(self.index);
            }
            Op::MbarrierInitFence => block.fence_mbarriers(self.index),
            Op::Wgmma(instruction) => return self.wgmma(block, instruction, pc, statement, active),
            Op::MatrixMove(matrix) => {
                if let Some(wait) = self.aligned(active)? {
                    return Ok(Flow::Again(wait));
                }
                self.matrix_move(block, matrix, statement)?;
            }
            Op::MmaSync(product) => {
                if let Some(wait) = self.aligned(active)? {
                    return Ok(Flow::Again(wait));
                }
                self.mma_sync(block, product);
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

    /// `add.cc` and its kin: a sum or difference that reads and writes a carry.
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

/// The lanes of a mask, from the lowest.
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

/// The lowest lane of a mask.
fn first(mask: u32) -> usize {
    mask.trailing_zeros() as usize & 31
}

/// Writes the active lanes of a register.
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

/// Writes the active lanes of a predicate.
#[inline(always)]
fn put_predicate(to: &mut u32, from: u32, active: u32) {
    *to = *to & !active | from & active;
}

/// The space that a generic address lies in, and the address in that space.
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

/// A sum or difference of `bits` bits with a carry, and the carry out. That of a difference is its
/// borrow.
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
