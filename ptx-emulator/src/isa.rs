//! The decoded form of a kernel: compact operations on register indices.
//!
//! A PTX instruction becomes one or a few operations. Every operand is the index of a register:
//! immediates, addresses of symbols and special registers are set once, when a warp starts.

use crate::alu::*;
use crate::float::Round;
use crate::tensor_core::ldmatrix::MatrixMove;
use crate::tensor_core::mma_sync;
use crate::tensor_core::wgmma::{self, FragmentUse};

/// The index of a register in its file: predicates, 32 bits or 64 bits, as the operation implies.
pub(crate) type R = u32;

/// Where a block's shared memory starts. On Hopper the first KiB belongs to the system, so that
/// address 0 is never valid.
pub(crate) const SHARED_BASE: u32 = 1024;
/// The most shared memory that a block has on Hopper, in bytes.
pub(crate) const MAX_SHARED: u32 = 227 * 1024;
/// The most local memory that a thread has, in bytes.
pub(crate) const MAX_LOCAL: u64 = 512 * 1024;
/// Where the shared, local and parameter windows start in the generic space. Each has 4 GiB. All
/// other generic addresses are global. The windows lie above every address of a process, which has
/// at most 57 bits.
pub(crate) const SHARED_WINDOW: u64 = 0x7f10_0000_0000_0000;
pub(crate) const LOCAL_WINDOW: u64 = 0x7f20_0000_0000_0000;
pub(crate) const PARAM_WINDOW: u64 = 0x7f30_0000_0000_0000;
/// Where the global and constant variables of a module start.
pub(crate) const MODULE_BASE: u64 = 0x7f40_0000_0000_0000;

/// A state space.
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

/// The register of an address.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base {
    None,
    R32(R),
    R64(R),
}

/// An address: the value of a register, if there is one, plus an offset in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: Base,
    pub offset: i64,
}

/// A register of a load or store.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slot {
    /// A register of at most 32 bits, with its declared width.
    R32(R, u8),
    R64(R),
    /// The value is dropped.
    Sink,
}

/// A load or store of `slots.len()` elements of `width` bytes at consecutive addresses.
#[derive(Clone, Debug)]
pub(crate) struct LoadStore {
    pub space: Space,
    pub address: Address,
    pub width: usize,
    pub signed: bool,
    /// Whether the access is volatile, relaxed, acquire or release.
    pub strong: bool,
    pub slots: Vec<Slot>,
}

/// What an atomic operation does to the old value.
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

/// The type of an atomic operation's elements; integers and bits of any width.
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

/// An `atom` or `red` on one or several consecutive elements.
#[derive(Clone, Debug)]
pub(crate) struct Atomic {
    pub space: Space,
    pub address: Address,
    pub op: AtomicOp,
    pub kind: AtomicType,
    /// Bytes of an element: 2, 4 or 8.
    pub width: usize,
    /// The registers for old values; `red` has none.
    pub old: Vec<Slot>,
    pub b: Vec<Slot>,
    /// The new value of a compare-and-swap, whose `b` is what it compares with.
    pub c: Option<Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

/// A `shfl`.
#[derive(Clone, Debug)]
pub(crate) struct Shuffle {
    pub mode: ShuffleMode,
    pub d: R,
    /// The predicate that tells whether the source lane lay in range.
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

/// A `vote` on predicate `p`, which may be negated.
#[derive(Clone, Debug)]
pub(crate) struct Vote {
    pub mode: VoteMode,
    /// A 32-bit register for a ballot, else a predicate.
    pub d: R,
    pub p: R,
    pub negated: bool,
    pub mask: R,
}

/// A `match`: which lanes hold the same value.
#[derive(Clone, Debug)]
pub(crate) struct Match {
    /// `match.all`, in place of `match.any`.
    pub all: bool,
    /// Whether the values have 64 bits.
    pub wide: bool,
    pub d: R,
    /// The predicate that tells whether all lanes hold the same value.
    pub p: Option<R>,
    pub a: R,
    pub mask: R,
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
    /// Counts the threads whose predicate holds, in a 32-bit register.
    Popc,
    And,
    Or,
}

/// A `bar` or `barrier`.
#[derive(Clone, Debug)]
pub(crate) struct NamedBarrier {
    pub kind: BarrierKind,
    pub aligned: bool,
    pub id: R,
    /// How many threads take part. Without it, the whole block does.
    pub count: Option<R>,
    /// The result of a reduction, and the predicate that it reduces.
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

/// How a wait names a phase.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Phase {
    /// By the state that an arrival returned, in a 64-bit register.
    State(R),
    /// By its parity, in a 32-bit register.
    Parity(R),
}

/// An instruction on an mbarrier.
#[derive(Clone, Debug)]
pub(crate) struct MbarrierUse {
    pub kind: MbarrierKind,
    pub space: Space,
    pub address: Address,
}

/// A `cp.async.bulk` between global and shared memory.
#[derive(Clone, Debug)]
pub(crate) struct Bulk {
    pub shared: Address,
    pub global: Address,
    pub bytes: R,
    /// The mbarrier that a copy to shared memory counts in. A copy from shared memory has none.
    pub barrier: Option<Address>,
}

/// A `cp.async`: a thread copies 4, 8 or 16 bytes from global to shared memory.
#[derive(Clone, Debug)]
pub(crate) struct AsyncCopy {
    pub shared: Address,
    pub global: Address,
    pub bytes: usize,
    /// How many bytes are copied. Zeros fill the rest. Without it, all are copied.
    pub source_bytes: Option<R>,
}

/// A special register that `mov` reads, and that is set when a warp starts.
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

/// One operation. Its destination stands first, then its sources.
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
    /// Destination; value, base, position and length.
    Insert32(R, [R; 4]),
    Insert64(R, [R; 4]),
    Directed(Directed, Round, R, [R; 3]),
    Compare32(Compare32, R, R, R),
    Compare64(Compare64, R, R, R),
    Select32(R, R, R, R),
    Select64(R, R, R, R),
    /// A sum or difference with a carry. `read` and `write` tell what is done with the predicate
    /// `carry`.
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
    /// Reads a counter that moves with every instruction.
    Clock(R),
    Branch(u32),
    BranchIndexed(R, Box<[u32]>),
    Exit,
    Trap,
    /// Lets other warps run first.
    Yield,
    Load(Box<LoadStore>),
    Store(Box<LoadStore>),
    Atomic(Box<Atomic>),
    /// Destination predicate, 64-bit address, space.
    IsSpace(R, R, Space),
    /// Has no effect, but a global address must be valid.
    Prefetch(Address),
    Shuffle(Box<Shuffle>),
    Vote(Box<Vote>),
    Match(Box<Match>),
    Redux(ReduxOp, R, R, R),
    /// `d` gets the leader's lane, and `p` tells whether a lane is the leader.
    Elect {
        d: Option<R>,
        p: R,
        mask: R,
    },
    ActiveMask(R),
    WarpSync(R),
    NamedBarrier(Box<NamedBarrier>),
    Mbarrier(Box<MbarrierUse>),
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
    Wgmma(wgmma::Instruction),
    MatrixMove(Box<MatrixMove>),
    MmaSync(Box<mma_sync::Product>),
    /// The new number of registers of a thread, and whether it is an increase.
    SetMaxRegisters(u32, bool),
}

/// The guard of an instruction that has none.
pub(crate) const NO_GUARD: u32 = u32::MAX;

/// An operation in a kernel's code.
#[derive(Clone, Debug)]
pub(crate) struct Inst {
    pub op: Op,
    /// The guard: twice its predicate, plus one if it is negated; or [`NO_GUARD`].
    pub guard: u32,
    /// The index of its statement in [`Kernel::lines`].
    pub statement: u32,
    /// Whether it is the first operation of its statement, which statistics count.
    pub first: bool,
    /// The index in [`Kernel::fragment_uses`] of the watched registers among its operands; or
    /// [`NO_FRAGMENT`].
    pub fragment: u32,
}

/// What [`Inst::fragment`] is when no operand is a watched register of a `wgmma`.
pub(crate) const NO_FRAGMENT: u32 = u32::MAX;

/// A statement as it stands in the text.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub line: u32,
    pub text: String,
    pub opcode: String,
}

/// A decoded entry.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub name: String,
    pub code: Vec<Inst>,
    pub lines: Vec<Line>,
    /// How many registers each file has: predicates, 32-bit, 64-bit.
    pub registers: [usize; 3],
    /// Registers that hold a constant or a special register.
    pub constants32: Vec<(R, u32)>,
    pub constants64: Vec<(R, u64)>,
    /// A predicate that is always true.
    pub true_predicate: R,
    pub specials: Vec<(R, Special)>,
    pub param_bytes: u64,
    /// Bytes of static shared memory. Dynamic shared memory starts behind it, at a multiple of
    /// `dynamic_align`.
    pub static_shared: u32,
    pub dynamic_align: u32,
    /// Bytes of local memory that a thread has.
    pub local_bytes: u32,
    /// The most threads of a block, from `.maxntid` or `.reqntid`.
    pub max_threads: Option<u32>,
    /// The block of `.reqntid`.
    pub required_block: Option<[u32; 3]>,
    /// The blocks of `.minnctapersm`; 1 without it.
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
    /// Tells `see` of each 32-bit register that the operation reads or writes, if it is not a
    /// `wgmma`.
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
            Op::Vote(vote) => {
                see(vote.mask, Read);
                if vote.mode == VoteMode::Ballot {
                    see(vote.d, Write);
                }
            }
            Op::Match(op) => {
                see(op.mask, Read);
                if !op.wide {
                    see(op.a, Read);
                }
                see(op.d, Write);
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
                copy.source_bytes.iter().for_each(|r| see(*r, Read));
            }
            Op::MatrixMove(m) => {
                address(&m.address, see);
                m.registers.iter().for_each(|r| see(*r, if m.store { Read } else { Write }));
            }
            Op::MmaSync(product) => {
                product.a.iter().chain(&product.b).chain(&product.c).for_each(|r| see(*r, Read));
                product.d.iter().for_each(|r| see(*r, Write));
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
            | Op::Wgmma(_)
            | Op::SetMaxRegisters(..) => {}
        }
    }
}
