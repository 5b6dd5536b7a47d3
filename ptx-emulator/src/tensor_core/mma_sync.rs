//! `mma.sync`: the tensor-core family of Ampere (sm_80), which every later GPU has too.
//!
//! A warp multiplies alone: D (16 x 8) = A (16 x 16) B (16 x 8) + C. All four lie in registers, as
//! [`fragment`](super::fragment) tells, and the result is there when the instruction ends.
//!
//! The sums are those of [`sums`](super::sums). That is Hopper's arithmetic as `wgmma` shows it.
//! Whether `mma.sync` has the same on Hopper was not probed: the example `mma_probe` asks a GPU.
//! Ampere and Ada are known to add eight products at a time, so that last bits differ there.

use super::ElementType;
use super::sums::{Rows, columns_of_registers, multiply, rows_of_registers};
use crate::alu::Lanes;
use crate::block::Block;
use crate::decode::{Decode, Decoder, Mods};
use crate::isa::{Op, R};
use crate::parse::{Class, Statement};
use crate::warp::Warp;
use std::collections::HashMap;

/// `mma.sync.aligned.m16n8k16.row.col.f32`, with its registers in a lane.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub element: ElementType,
    pub d: [R; 4],
    pub a: [R; 4],
    pub b: [R; 2],
    pub c: [R; 4],
}

impl Decoder<'_> {
    pub(crate) fn mma_sync(&mut self, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") || !m.take("aligned") {
            return Err("mma needs `.sync.aligned`".into());
        }
        let element = match std::mem::take(&mut m.parts)[..] {
            ["m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"] => ElementType::Bf16,
            ["m16n8k16", "row", "col", "f32", "f16", "f16", "f32"] => ElementType::F16,
            _ => {
                return Err("this shape, layout or type is unknown: only m16n8k16.row.col.f32.bf16.bf16.f32 and \
                            m16n8k16.row.col.f32.f16.f16.f32 are known"
                    .into());
            }
        };
        if s.operands.len() != 4 {
            return Err(format!("{} operands instead of 4", s.operands.len()));
        }
        let (d, a) = (self.fragment(s, 0)?, self.fragment(s, 1)?);
        let (b, c) = (self.fragment(s, 2)?, self.fragment(s, 3)?);
        self.push(Op::MmaSync(Box::new(Product { element, d, a, b, c })));
        Ok(())
    }

    /// The N registers of a fragment.
    fn fragment<const N: usize>(&self, s: &Statement, i: usize) -> Decode<[R; N]> {
        let elements = Self::elements(self.operand(s, i)?);
        let registers =
            elements.iter().map(|element| Ok(self.reg(element, Class::R32)?.index)).collect::<Decode<Vec<R>>>()?;
        registers
            .try_into()
            .map_err(|found: Vec<R>| format!("operand {} has {} registers where {N} are needed", i + 1, found.len()))
    }
}

/// The matrices A of a warp, decoded, by their registers. One is used with many matrices B, and
/// decoding it takes as long as a product.
pub(crate) type MatricesA = HashMap<[R; 4], MatrixA>;

/// A decoded matrix A, and what its registers held.
pub(crate) struct MatrixA {
    registers: [Lanes<u32>; 4],
    element: ElementType,
    rows: Vec<Rows>,
}

impl MatrixA {
    fn new(registers: [Lanes<u32>; 4], element: ElementType) -> MatrixA {
        MatrixA { registers, element, rows: rows_of_registers(registers.each_ref(), element) }
    }
}

impl Warp {
    /// Executes a product, which the whole warp has reached together.
    pub(crate) fn mma_sync(&mut self, block: &mut Block, op: &Product) {
        let registers = op.a.map(|r| self.r32[r as usize]);
        let a = self.matrices_a.entry(op.a).or_insert_with(|| MatrixA::new(registers, op.element));
        if a.registers != registers || a.element != op.element {
            *a = MatrixA::new(registers, op.element);
        }
        let b = columns_of_registers(op.b.map(|r| &self.r32[r as usize]), op.element);
        // D may have registers of the others in any order, so all are read before one is written.
        let c = op.c.map(|r| self.r32[r as usize]);
        for (d, c) in op.d.iter().zip(c) {
            self.r32[*d as usize] = c;
        }
        multiply(&mut self.r32, &op.d, &a.rows, &b, op.element);
        block.counters.products += (16 * 8 * op.element.k()) as u64;
    }
}
