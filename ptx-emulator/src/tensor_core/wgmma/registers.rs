//! The registers of a warp that products in flight use.
//!
//! A product reads and writes its registers at any time until its wait. ptxas may put a copy of
//! such a register in the same place. So the registers of products, and those that `mov` joins with
//! them, are watched: the decoder marks each operation that touches one.

use super::{Instruction, OperandA, Product};
use crate::alu::Unary32;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::{Inst, Kernel, Op, R, Use};

/// The watched registers that an operation touches.
#[derive(Clone, Debug, Default)]
pub(crate) struct FragmentUse {
    pub reads: Vec<R>,
    pub writes: Vec<R>,
    /// Whether the operation is a `mov` from the one read to the one written.
    pub copy: bool,
}

/// Finds the registers to watch, and tells each operation which of them it touches.
///
/// These are the registers of products and those that a `mov` joins with them, because ptxas makes
/// one of the two. Constants do not join what they are moved to.
pub(crate) fn mark(code: &mut [Inst], registers: usize, constants: &[R]) -> Vec<FragmentUse> {
    let mut constant = vec![false; registers];
    constants.iter().for_each(|r| constant[*r as usize] = true);
    let mut watched = vec![false; registers];
    for inst in code.iter() {
        if let Op::Wgmma(Instruction::Multiply(product)) = &inst.op {
            product.d.iter().for_each(|r| watched[*r as usize] = true);
            if let OperandA::Registers(a) = product.a {
                a.into_iter().for_each(|r| watched[r as usize] = true);
            }
        }
    }
    loop {
        let mut grown = false;
        for inst in code.iter() {
            if let Op::Unary32(Unary32::Mov, d, a) = inst.op
                && watched[a as usize] != watched[d as usize]
                && !constant[a as usize]
            {
                (watched[a as usize], watched[d as usize]) = (true, true);
                grown = true;
            }
        }
        if !grown {
            break;
        }
    }
    let mut uses = Vec::new();
    for inst in code {
        let mut found =
            FragmentUse { copy: matches!(inst.op, Op::Unary32(Unary32::Mov, ..)), ..FragmentUse::default() };
        inst.op.visit32(&mut |r, how| match how {
            // A copy needs its source even if that is a constant.
            Use::Read if watched[r as usize] || found.copy => found.reads.push(r),
            Use::Write if watched[r as usize] => found.writes.push(r),
            _ => {}
        });
        if (found.copy && found.writes.is_empty()) || (found.reads.is_empty() && found.writes.is_empty()) {
            continue;
        }
        inst.fragment = uses.len() as u32;
        uses.push(found);
    }
    uses
}

/// What a watched register is to the product that last used it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Role {
    #[default]
    Accumulator,
    MatrixA,
    /// A `mov` copied it from an accumulator in flight, and ptxas may join the two.
    Copy,
}

/// The state of one watched register.
#[derive(Clone, Copy, Default)]
struct Fragment {
    /// How many products must be complete before it may be touched.
    until: u64,
    role: Role,
    /// How many columns the product has that it accumulates.
    n: usize,
    /// When an ordinary instruction last touched it: one more than the fences executed before.
    touched: u64,
}

/// The time of a touch for a constant. A `mov` of it counts as a write at the time of the `mov`.
const ALWAYS: u64 = u64::MAX;

/// What a warp knows of its products and of the registers that they use.
pub(crate) struct Registers {
    /// By 32-bit register; empty in a kernel without `wgmma`.
    fragments: Vec<Fragment>,
    /// How many `wgmma.fence` the warp has executed.
    fences: u64,
    /// How many products were issued when each group was committed.
    commits: Vec<u64>,
    /// How many products the warp knows to be complete.
    complete: u64,
}

impl Registers {
    pub fn new(kernel: &Kernel) -> Registers {
        let watched = if kernel.has_wgmma { kernel.registers[1] } else { 0 };
        Registers { fragments: vec![Fragment::default(); watched], fences: 0, commits: Vec::new(), complete: 0 }
    }

    /// Makes all as at the entry of a kernel.
    pub fn reset(&mut self, kernel: &Kernel) {
        self.fragments.fill(Fragment::default());
        (self.fences, self.complete) = (0, 0);
        self.commits.clear();
        if kernel.has_wgmma {
            kernel.constants32.iter().for_each(|(r, _)| self.fragments[*r as usize].touched = ALWAYS);
        }
    }

    pub fn fence(&mut self) {
        self.fences += 1;
    }

    /// Commits a group of the products up to number `issued`.
    pub fn commit(&mut self, issued: u64) {
        self.commits.push(issued);
    }

    /// How many products all groups but the `pending` latest have.
    pub fn committed(&self, pending: u32) -> u64 {
        let groups = self.commits.len().saturating_sub(pending as usize);
        if groups == 0 { 0 } else { self.commits[groups - 1] }
    }

    /// The warp has waited for the first `products`.
    pub fn complete(&mut self, products: u64) {
        self.complete = self.complete.max(products);
    }

    /// Checks and remembers that an ordinary operation touches watched registers.
    pub fn touch(&mut self, uses: &FragmentUse) -> Step {
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

    /// Checks and marks the registers of a product. `until` is its number, counted from 1.
    pub fn issue(&mut self, op: &Product, until: u64) -> Step {
        if self.fences == 0 {
            let what = "no wgmma.fence was executed before the first wgmma.mma_async";
            return Err(Trouble::new(FaultKind::MissingFence, what));
        }
        let (complete, now) = (self.complete, self.fences + 1);
        let unfenced = |name: &str| {
            let what = format!("{name} was touched after the last wgmma.fence: a fence must stand between");
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
