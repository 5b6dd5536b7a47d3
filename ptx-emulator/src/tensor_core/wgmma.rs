//! `wgmma`: the tensor-core family of Hopper (sm_90a).
//!
//! The four warps of a warpgroup multiply together: D (64 x N) += A (64 x k) B (k x N), with 32 bytes
//! of k: 16 of bf16 or f16, 32 of e4m3. D lies in registers, B in shared memory, A in either. The instruction returns at once, and its product
//! stays in flight until a `wgmma.wait_group`.
//!
//! Here each warp computes its own 16 rows of D when it issues the instruction. A GPU computes them
//! later. The result is the same, because a write to memory that a product in flight reads is
//! refused. So is a use of its registers before the wait.
//!
//! A wait passes when all four warps have issued the products that it waits for, because the
//! hardware runs a product for the whole warpgroup. The wait releases the registers of its own
//! warp. The memory is released when all four warps have waited, for writers that are ordered after
//! all four waits.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`decode`] | how a statement becomes an [`Instruction`] |
//! | [`tile`] | matrices in shared memory: descriptors, layouts, the swizzle |
//! | [`registers`] | which registers of a warp products in flight use |
//! | [`in_flight`] | which memory the products of a warpgroup read |

mod decode;
mod in_flight;
mod registers;
mod tile;

pub(crate) use in_flight::Warpgroup;
pub(crate) use registers::{FragmentUse, Registers, mark};
pub(crate) use tile::Tiles;

use super::ElementType;
use super::sums::{Rows, multiply, rows_of_registers};
use crate::alu::Lanes;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::R;
use crate::race::{By, check_proxy_read};
use crate::warp::{Flow, Wait, Warp};
use in_flight::InFlight;

/// How many rows A and D have.
const M: usize = 64;

/// The instructions of the family.
#[derive(Clone, Debug)]
pub(crate) enum Instruction {
    Fence,
    Commit,
    /// `wgmma.wait_group`: the warp waits for all groups but so many of the latest.
    Wait(u32),
    Multiply(Box<Product>),
}

/// `wgmma.mma_async.m64nNk16.f32` of bf16 or f16, or `.m64nNk32.f32` of e4m3.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub element: ElementType,
    /// How many columns B and D have.
    pub n: usize,
    /// The N / 2 accumulators of a lane.
    pub d: Vec<R>,
    pub a: OperandA,
    /// The 64-bit register that holds the descriptor of B.
    pub b: R,
    /// A predicate, and whether it is negated. When it does not hold, the accumulators start at
    /// zero.
    pub scale_d: (R, bool),
    pub negate_a: bool,
    pub negate_b: bool,
    /// Whether A is stored with M contiguous in place of K, and B with N.
    pub transpose_a: bool,
    pub transpose_b: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum OperandA {
    /// The 64-bit register that holds the descriptor of a matrix in shared memory.
    Descriptor(R),
    Registers([R; 4]),
}

impl Warp {
    /// Executes an instruction of the family, which the whole warp must reach together.
    pub(crate) fn wgmma(
        &mut self,
        block: &mut Block,
        instruction: &Instruction,
        pc: usize,
        statement: u32,
        active: u32,
    ) -> Step<Flow> {
        if let Some(wait) = self.whole(block, active)? {
            return Ok(Flow::Again(wait));
        }
        let (group, rank) = (self.index / 4, self.index % 4);
        match instruction {
            Instruction::Fence => self.products.fence(),
            Instruction::Commit => self.products.commit(block.warpgroups[group].issued[rank]),
            Instruction::Wait(pending) => {
                let products = self.products.committed(*pending);
                let warpgroup = &mut block.warpgroups[group];
                if !warpgroup.reached(products) {
                    return Ok(Flow::Again(Wait::Products(products)));
                }
                warpgroup.release(self.index, products, block.shared.clocks.now(self.index));
                self.products.complete(products);
                block.progress += 1;
            }
            Instruction::Multiply(product) => issue(block, self, product, pc, statement)?,
        }
        Ok(Flow::Next)
    }
}

/// The value that all lanes hold. It is a fault if they differ.
fn uniform(lanes: &Lanes<u64>, what: &str) -> Step<u64> {
    match lanes.iter().position(|value| *value != lanes[0]) {
        None => Ok(lanes[0]),
        Some(lane) => Err(Trouble::lane(
            FaultKind::Operand,
            lane,
            format!(
                "{what} is {:#x} here and {:#x} in lane 0: it must be the same in all lanes",
                lanes[lane], lanes[0]
            ),
        )),
    }
}

/// One warp issues a product. `operation` is the index of the instruction in the kernel's code.
fn issue(block: &mut Block, warp: &mut Warp, op: &Product, operation: usize, statement: u32) -> Step {
    let by = By { warp: warp.index, lane: None, statement };
    let group = warp.index / 4;
    let rank = warp.index % 4;
    if block.threads < 128 * (group as u32 + 1) {
        return Err(Trouble::new(FaultKind::Operand, "the warp is not one of a warpgroup of four whole warps"));
    }
    let b_descriptor = uniform(&warp.r64[op.b as usize], "descriptor B")?;
    let a_descriptor = match op.a {
        OperandA::Descriptor(r) => Some(uniform(&warp.r64[r as usize], "descriptor A")?),
        OperandA::Registers(_) => None,
    };
    let scale = warp.predicates[op.scale_d.0 as usize] ^ if op.scale_d.1 { u32::MAX } else { 0 };
    if scale != 0 && scale != u32::MAX {
        let what = format!("scale-d differs between lanes: {scale:#x}; it must be the same in all");
        return Err(Trouble::new(FaultKind::Operand, what));
    }
    let number = block.warpgroups[group].issued[rank];
    match block.warpgroups[group].product(number) {
        None => start(block, op, (a_descriptor, b_descriptor), operation, by)?,
        Some(product) if product.operation != operation || product.descriptors != (a_descriptor, b_descriptor) => {
            let what = format!(
                "warp {} of the warpgroup issued the wgmma of line {} as its product {number}, with descriptors {:#x?}; \
                 this warp issues another, with {:#x?}",
                product.by.warp,
                block.kernel.lines[product.by.statement as usize].line,
                product.descriptors,
                (a_descriptor, b_descriptor)
            );
            return Err(Trouble::new(FaultKind::Divergence, what));
        }
        Some(product) => {
            let clocks = &block.shared.clocks;
            check_proxy_read(clocks, &product.b.writers, by, || "wgmma read of matrix B".into())?;
            if let Some(a) = &product.a {
                check_proxy_read(clocks, &a.writers, by, || "wgmma read of matrix A".into())?;
            }
        }
    }
    let warpgroup = &mut block.warpgroups[group];
    warpgroup.issued[rank] += 1;
    let product = warpgroup.product(number).expect("the product was found or started above");
    warp.products.issue(op, number + 1)?;

    let in_registers;
    let mut a = match (op.a, &product.a) {
        (OperandA::Registers(r), _) => {
            in_registers = rows_of_registers(r.map(|r| &warp.r32[r as usize]), op.element);
            &in_registers[..]
        }
        (_, a) => {
            let count = op.element.k();
            &a.as_ref().expect("a product with a descriptor of A has A").values[rank * count..][..count]
        }
    };
    let negated: Vec<Rows>;
    if op.negate_a != op.negate_b {
        negated = a.iter().map(Rows::negated).collect();
        a = &negated;
    }
    if scale == 0 {
        op.d.iter().for_each(|r| warp.r32[*r as usize] = [0; 32]);
    }
    multiply(&mut warp.r32, &op.d, a, &product.b.values, op.element);
    block.counters.products += (16 * op.n * op.element.k()) as u64;
    block.progress += 1;
    Ok(())
}

/// The first warp of a warpgroup starts a product: its operands are checked and decoded.
fn start(block: &mut Block, op: &Product, descriptors: (Option<u64>, u64), operation: usize, by: By) -> Step {
    let warpgroup = &mut block.warpgroups[by.warp / 4];
    let (tile, b) = block.tiles.columns_of_b(&block.shared, op, descriptors.1, by)?;
    let mut reads = [Some(warpgroup.start_read(tile, b.range, by.statement)), None];
    let mut a = None;
    if let Some(descriptor) = descriptors.0 {
        let (tile, decoded) = block.tiles.rows_of_a(&block.shared, op, descriptor, by)?;
        reads[1] = Some(warpgroup.start_read(tile, decoded.range, by.statement));
        a = Some(decoded);
    }
    warpgroup.push(InFlight { operation, descriptors, reads, a, b, by });
    Ok(())
}
