//! The decoded form of a kernel: compact operations on register indices.
//!
//! Immediates, symbol addresses and constant special registers are registers too, set once when a warp starts, so that every
//! operand is an index. A PTX instruction becomes one or a few operations.

use crate::alu::*;
use crate::float::Round;

/// Index of a register in the file that the operation implies.
pub(crate) type R = u32;

/// Where dynamic and static shared memory start in the shared window: the first KiB belongs to the system on Hopper, so that
/// address 0 is never valid.
pub(crate) const SHARED_BASE: u32 = 1024;
/// Generic addresses of the shared, local and parameter windows; 4 GiB each. Everything else is global.
pub(crate) const SHARED_WINDOW: u64 = 0x7f10_0000_0000;
pub(crate) const LOCAL_WINDOW: u64 = 0x7f20_0000_0000;
pub(crate) const PARAM_WINDOW: u64 = 0x7f30_0000_0000;
/// Where the module's own global and constant data lie.
pub(crate) const MODULE_BASE: u64 = 0x7f40_0000_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
}

impl Space {
    pub fn name(self) -> &'static str {
        match self {
            Space::Generic => "generic",
            Space::Global => "global",
            Space::Shared => "shared",
            Space::Local => "local",
            Space::Param => "parameter",
        }
    }
}

/// Register part of an address.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base {
    None,
    R32(R),
    R64(R),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: Base,
    pub offset: i64,
}

/// A register of a load or store, with its declared width.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slot {
    R32(R, u8),
    R64(R),
    Sink,
}

/// A load or store of `slots.len()` elements of `width` bytes at consecutive addresses.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub space: Space,
    pub address: Address,
    pub width: usize,
    pub signed: bool,
    /// Volatile, relaxed, acquire or release.
    pub strong: bool,
    pub slots: Vec<Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    Add,
    Min,
    Max,
    Inc,
    Dec,
    And,
    Or,
    Xor,
    Exchange,
    CompareSwap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicType {
    Unsigned,
    Signed,
    F32,
    F64,
    F16,
    Bf16,
    F16x2,
    Bf16x2,
}

/// `atom` and `red`, of one or several consecutive elements.
#[derive(Clone, Debug)]
pub(crate) struct Atomic {
    pub space: Space,
    pub address: Address,
    pub op: AtomicOp,
    pub kind: AtomicType,
    /// Bytes of an element: 2, 4 or 8.
    pub width: usize,
    /// Old values, absent for `red`.
    pub old: Vec<Slot>,
    pub b: Vec<Slot>,
    /// New value of a compare-and-swap.
    pub c: Option<Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Debug)]
pub(crate) struct Shuffle {
    pub mode: ShuffleMode,
    pub d: R,
    /// Predicate: whether the source lane lay in range.
    pub p: Option<R>,
    pub a: R,
    pub b: R,
    pub c: R,
    pub mask: R,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReduxOp {
    Add,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarrierKind {
    Sync,
    Arrive,
    /// Threads whose predicate holds, in a 32-bit register.
    Popc,
    And,
    Or,
}

/// `bar` and `barrier`.
#[derive(Clone, Debug)]
pub(crate) struct NamedBarrier {
    pub kind: BarrierKind,
    pub aligned: bool,
    pub id: R,
    /// Threads that take part; all of the block when absent.
    pub count: Option<R>,
    /// Result and predicate of a reduction.
    pub d: R,
    pub p: R,
    pub p_negated: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum MbarrierKind {
    Init { count: R },
    Invalidate,
    Arrive { count: Option<R>, expect: Option<R>, drop: bool, state: Option<R> },
    ExpectTx { bytes: R },
    CompleteTx { bytes: R },
    Test { p: R, phase: Phase, blocking: bool },
}

/// How a wait names the phase: by the state an arrival returned (64-bit register) or by parity (32-bit register).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Phase {
    State(R),
    Parity(R),
}

#[derive(Clone, Debug)]
pub(crate) struct Mbarrier {
    pub kind: MbarrierKind,
    pub space: Space,
    pub address: Address,
}

/// `cp.async.bulk` between global and shared memory.
#[derive(Clone, Debug)]
pub(crate) struct Bulk {
    pub shared: Address,
    pub global: Address,
    pub bytes: R,
    /// The mbarrier of a copy to shared memory; `None` for a copy from it.
    pub barrier: Option<Address>,
}

/// `cp.async`: a thread's copy of 4, 8 or 16 bytes from global to shared memory.
#[derive(Clone, Debug)]
pub(crate) struct AsyncCopy {
    pub shared: Address,
    pub global: Address,
    pub bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Bf16,
    F16,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum OperandA {
    /// 64-bit register with a descriptor.
    Descriptor(R),
    Registers([R; 4]),
}

/// `wgmma.mma_async.m64nNk16.f32`.
#[derive(Clone, Debug)]
pub(crate) struct Wgmma {
    pub half: Half,
    pub n: usize,
    /// N / 2 accumulators.
    pub d: Vec<R>,
    pub a: OperandA,
    pub b: R,
    /// Predicate and whether it is negated: the product is added to the accumulators when it holds.
    pub scale_d: (R, bool),
    pub negate_a: bool,
    pub negate_b: bool,
    /// Operand stored with M (A) or N (B) contiguous.
    pub transpose_a: bool,
    pub transpose_b: bool,
}

/// `ldmatrix` and `stmatrix` of 8 x 8 matrices of 16-bit elements.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub space: Space,
    pub address: Address,
    pub registers: Vec<R>,
    pub transpose: bool,
    pub store: bool,
}

/// What differs between warps or moves with time, read by `mov`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    LaneId,
    WarpId,
    NwarpId,
    SmId,
    NsmId,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    DynamicSmem,
    TotalSmem,
    Zero,
    One,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PredOp {
    Mov,
    Not,
    And,
    Or,
    Xor,
}

/// One operation. Field order: destination, sources.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Nop,
    Unary32(Unary32, R, R),
    Binary32(Binary32, R, R, R),
    Ternary32(Ternary32, R, R, R, R),
    Unary64(Unary64, R, R),
    Binary64(Binary64, R, R, R),
    Ternary64(Ternary64, R, R, R, R),
    Widen(Widen, R, R),
    Narrow(Narrow, R, R),
    WideMul(WideMul, R, R, R),
    WideMad(WideMad, R, R, R, R),
    Shift64(Shift64, R, R, R),
    Lop3(u8, R, [R; 3]),
    /// Value, base, position, length.
    Insert32(R, [R; 4]),
    Insert64(R, [R; 4]),
    Directed(Directed, Round, R, [R; 3]),
    Compare32(Compare32, R, R, R),
    Compare64(Compare64, R, R, R),
    Select32(R, R, R, R),
    Select64(R, R, R, R),
    /// Destination, a, b and carry predicate; `in`, `out`: whether the carry is read and written.
    Carry {
        wide: bool,
        subtract: bool,
        d: R,
        a: R,
        b: R,
        carry: R,
        read: bool,
        write: bool,
    },
    Pred(PredOp, R, R, R),
    /// A counter that moves with every instruction.
    Clock(R),
    Branch(u32),
    BranchIndexed(R, Box<[u32]>),
    Exit,
    Trap,
    /// Lets other warps run.
    Yield,
    Load(Box<Access>),
    Store(Box<Access>),
    Atomic(Box<Atomic>),
    /// Predicate, 64-bit address, space.
    IsSpace(R, R, Space),
    /// Address that must be valid if it is global, without effect.
    Prefetch(Address),
    Shuffle(Box<Shuffle>),
    /// Mode, result (32-bit register for a ballot, else predicate), predicate, negated, mask.
    Vote(VoteMode, R, R, bool, R),
    /// All, 64 bits wide, result, predicate, value, mask.
    Match {
        all: bool,
        wide: bool,
        d: R,
        p: Option<R>,
        a: R,
        mask: R,
    },
    Redux(ReduxOp, R, R, R),
    /// Leader's lane (32-bit register) and the predicate of being it.
    Elect {
        d: Option<R>,
        p: R,
        mask: R,
    },
    ActiveMask(R),
    WarpSync(R),
    NamedBarrier(Box<NamedBarrier>),
    Mbarrier(Box<Mbarrier>),
    Bulk(Box<Bulk>),
    BulkCommit,
    BulkWait {
        pending: u32,
    },
    AsyncCopy(Box<AsyncCopy>),
    AsyncCommit,
    AsyncWait {
        pending: u32,
    },
    ProxyFence,
    MbarrierInitFence,
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait(u32),
    Wgmma(Box<Wgmma>),
    Matrix(Box<Matrix>),
    /// New count per thread, and whether it is an increase.
    SetMaxRegisters(u32, bool),
}

/// No guard on an instruction.
pub(crate) const NO_GUARD: u32 = u32::MAX;

#[derive(Clone, Debug)]
pub(crate) struct Inst {
    pub op: Op,
    /// Predicate index times two plus one if negated, or [`NO_GUARD`].
    pub guard: u32,
    /// The PTX statement, an index into [`Kernel::lines`].
    pub statement: u32,
    /// First operation of its statement: the one that statistics count.
    pub first: bool,
    /// Index into [`Kernel::fragment_uses`] when registers that a `wgmma` uses, or copies of them, are operands; else
    /// [`NO_FRAGMENT`].
    pub fragment: u32,
}

/// No fragment register among the operands.
pub(crate) const NO_FRAGMENT: u32 = u32::MAX;

/// The fragment registers that an operation touches.
#[derive(Clone, Debug, Default)]
pub(crate) struct FragmentUse {
    pub reads: Vec<R>,
    pub writes: Vec<R>,
    /// A `mov` from the one read to the one written.
    pub copy: bool,
}

/// A statement's place in the text.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub line: u32,
    pub text: String,
    pub opcode: String,
}

#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub name: String,
    pub code: Vec<Inst>,
    pub lines: Vec<Line>,
    /// Registers of each file: predicates, 32-bit, 64-bit.
    pub registers: [usize; 3],
    pub constants32: Vec<(R, u32)>,
    pub constants64: Vec<(R, u64)>,
    /// Predicates that are always true.
    pub true_predicate: R,
    pub specials: Vec<(R, Special)>,
    pub param_bytes: u64,
    /// Bytes of static shared memory; dynamic shared memory starts behind it, aligned for its symbol.
    pub static_shared: u32,
    pub dynamic_align: u32,
    /// Bytes of local memory of a thread.
    pub local_bytes: u32,
    pub max_threads: Option<u32>,
    pub required_block: Option<[u32; 3]>,
    pub min_blocks: u32,
    pub has_wgmma: bool,
    pub fragment_uses: Vec<FragmentUse>,
}

/// How an operation uses a 32-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Read,
    Write,
}

impl Slot {
    fn visit(self, how: Use, see: &mut dyn FnMut(R, Use)) {
        if let Slot::R32(r, _) = self {
            see(r, how);
        }
    }
}

impl Op {
    /// The 32-bit registers that an operation other than `wgmma` reads and writes.
    pub fn visit32(&self, see: &mut dyn FnMut(R, Use)) {
        use Use::{Read, Write};
        let address = |a: &Address, see: &mut dyn FnMut(R, Use)| {
            if let Base::R32(r) = a.base {
                see(r, Read);
            }
        };
        match self {
            Op::Unary32(_, d, a) => {
                see(*a, Read);
                see(*d, Write);
            }
            Op::Binary32(_, d, a, b) => {
                see(*a, Read);
                see(*b, Read);
                see(*d, Write);
            }
            Op::Ternary32(_, d, a, b, c) => {
                [a, b, c].into_iter().for_each(|r| see(*r, Read));
                see(*d, Write);
            }
            Op::Widen(_, _, a) | Op::Shift64(_, _, _, a) => see(*a, Read),
            Op::Narrow(_, d, _) => see(*d, Write),
            Op::WideMul(_, _, a, b) | Op::WideMad(_, _, a, b, _) | Op::Compare32(_, _, a, b) => {
                see(*a, Read);
                see(*b, Read);
            }
            Op::Lop3(_, d, sources) | Op::Directed(_, _, d, sources) => {
                sources.iter().for_each(|r| see(*r, Read));
                see(*d, Write);
            }
            Op::Insert32(d, sources) => {
                sources.iter().for_each(|r| see(*r, Read));
                see(*d, Write);
            }
            Op::Insert64(_, [_, _, position, length]) => {
                see(*position, Read);
                see(*length, Read);
            }
            Op::Select32(d, a, b, _) => {
                see(*a, Read);
                see(*b, Read);
                see(*d, Write);
            }
            Op::Carry { wide: false, d, a, b, .. } => {
                see(*a, Read);
                see(*b, Read);
                see(*d, Write);
            }
            Op::BranchIndexed(r, _) | Op::WarpSync(r) => see(*r, Read),
            Op::Load(access) => {
                address(&access.address, see);
                access.slots.iter().for_each(|slot| slot.visit(Write, see));
            }
            Op::Store(access) => {
                address(&access.address, see);
                access.slots.iter().for_each(|slot| slot.visit(Read, see));
            }
            Op::Atomic(atomic) => {
                address(&atomic.address, see);
                atomic.b.iter().chain(&atomic.c).for_each(|slot| slot.visit(Read, see));
                atomic.old.iter().for_each(|slot| slot.visit(Write, see));
            }
            Op::Prefetch(a) => address(a, see),
            Op::Shuffle(s) => {
                [s.a, s.b, s.c, s.mask].into_iter().for_each(|r| see(r, Read));
                see(s.d, Write);
            }
            Op::Vote(mode, d, _, _, mask) => {
                see(*mask, Read);
                if *mode == VoteMode::Ballot {
                    see(*d, Write);
                }
            }
            Op::Match { wide, d, a, mask, .. } => {
                see(*mask, Read);
                if !wide {
                    see(*a, Read);
                }
                see(*d, Write);
            }
            Op::Redux(_, d, a, mask) => {
                see(*a, Read);
                see(*mask, Read);
                see(*d, Write);
            }
            Op::Elect { d, mask, .. } => {
                see(*mask, Read);
                d.iter().for_each(|d| see(*d, Write));
            }
            Op::ActiveMask(d) => see(*d, Write),
            Op::NamedBarrier(barrier) => {
                see(barrier.id, Read);
                barrier.count.iter().for_each(|r| see(*r, Read));
                if barrier.kind == BarrierKind::Popc {
                    see(barrier.d, Write);
                }
            }
            Op::Mbarrier(m) => {
                address(&m.address, see);
                match &m.kind {
                    MbarrierKind::Init { count: r }
                    | MbarrierKind::ExpectTx { bytes: r }
                    | MbarrierKind::CompleteTx { bytes: r }
                    | MbarrierKind::Test { phase: Phase::Parity(r), .. } => see(*r, Read),
                    MbarrierKind::Arrive { count, expect, .. } => {
                        count.iter().chain(expect).for_each(|r| see(*r, Read));
                    }
                    MbarrierKind::Invalidate | MbarrierKind::Test { .. } => {}
                }
            }
            Op::Bulk(bulk) => {
                address(&bulk.shared, see);
                address(&bulk.global, see);
                bulk.barrier.iter().for_each(|a| address(a, see));
                see(bulk.bytes, Read);
            }
            Op::AsyncCopy(copy) => {
                address(&copy.shared, see);
                address(&copy.global, see);
            }
            Op::Matrix(m) => {
                address(&m.address, see);
                m.registers.iter().for_each(|r| see(*r, if m.store { Read } else { Write }));
            }
            Op::Nop
            | Op::Unary64(..)
            | Op::Binary64(..)
            | Op::Ternary64(..)
            | Op::Compare64(..)
            | Op::Select64(..)
            | Op::Carry { .. }
            | Op::Pred(..)
            | Op::Clock(_)
            | Op::Branch(_)
            | Op::Exit
            | Op::Trap
            | Op::Yield
            | Op::IsSpace(..)
            | Op::BulkCommit
            | Op::BulkWait { .. }
            | Op::AsyncCommit
            | Op::AsyncWait { .. }
            | Op::ProxyFence
            | Op::MbarrierInitFence
            | Op::WgmmaFence
            | Op::WgmmaCommit
            | Op::WgmmaWait(_)
            | Op::Wgmma(_)
            | Op::SetMaxRegisters(..) => {}
        }
    }
}
