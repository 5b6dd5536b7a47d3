//! `ldmatrix` and `stmatrix`: 8 x 8 matrices of 16-bit elements between shared memory and
//! fragments.
//!
//! Lanes 8i to 8i + 7 give the addresses of the rows of matrix i; a row has 16 bytes. Each lane has
//! one register for each matrix, as [`fragment::of_8x8`] tells, or that of the transposed matrix.

use super::fragment;
use crate::block::Block;
use crate::decode::{Decode, Decoder, Mods};
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::{Address, Op, R, Space};
use crate::parse::{Class, Statement};
use crate::race::By;
use crate::warp::Warp;

/// An `ldmatrix`, or with `store` an `stmatrix`, of one matrix for each register.
#[derive(Clone, Debug)]
pub(crate) struct MatrixMove {
    pub space: Space,
    pub address: Address,
    pub registers: Vec<R>,
    pub transpose: bool,
    pub store: bool,
}

impl Decoder<'_> {
    pub(crate) fn matrix_move(&mut self, store: bool, s: &Statement, m: &mut Mods) -> Decode {
        if !m.take("sync") || !m.take("aligned") || !m.take("m8n8") || !m.take("b16") {
            return Err("only .sync.aligned.m8n8 matrices of .b16 are known".into());
        }
        let count = m.find(|part| match part {
            "x1" => Some(1),
            "x2" => Some(2),
            "x4" => Some(4),
            _ => None,
        });
        let count = count.ok_or("the number of matrices is missing: .x1, .x2 or .x4")?;
        let transpose = m.take("trans");
        let space = m.space()?;
        let (registers, at) = if store { (1, 0) } else { (0, 1) };
        let elements = Self::elements(self.operand(s, registers)?);
        if elements.len() != count {
            return Err(format!("{} registers for {count} matrices", elements.len()));
        }
        let registers =
            elements.iter().map(|element| Ok(self.reg(element, Class::R32)?.index)).collect::<Decode<Vec<R>>>()?;
        let address = self.address(s, at, space)?;
        self.push(Op::MatrixMove(Box::new(MatrixMove { space, address, registers, transpose, store })));
        Ok(())
    }
}

impl Warp {
    pub(crate) fn matrix_move(&mut self, block: &mut Block, matrix: &MatrixMove, statement: u32) -> Step {
        let place = |lane: usize, half: usize| {
            let (row, column) = fragment::of_8x8(lane, half);
            if matrix.transpose { (column, row) } else { (row, column) }
        };
        // Rows of all matrices: matrix i has rows 8i to 8i + 7, each with two elements in a word.
        let mut rows = [[0u32; 4]; 32];
        if matrix.store {
            for (i, r) in matrix.registers.iter().enumerate() {
                let values = self.r32[*r as usize];
                for (lane, value) in values.iter().enumerate() {
                    for half in 0..2 {
                        let (row, column) = place(lane, half);
                        rows[8 * i + row][column / 2] |= (value >> (16 * half) & 0xffff) << (16 * (column % 2));
                    }
                }
            }
        }
        let (count, mut offsets) = (8 * matrix.registers.len(), [0; 32]);
        for (lane, row) in rows.iter_mut().enumerate().take(count) {
            let (space, address) = self.resolve(matrix.space, &matrix.address, lane);
            if space != Space::Shared {
                let what = format!("a matrix row at {address:#x}, which is not in shared memory");
                return Err(Trouble::lane(FaultKind::OutOfBounds, lane, what));
            }
            let offset = block.shared.offset(address, 16, 16, lane)?;
            offsets[lane] = offset as u32;
            let by = By { warp: self.index, lane: Some(lane), statement };
            if matrix.store {
                let words = [row[0], row[1], row[2], row[3], 0, 0, 0, 0];
                self.store_words(block, Space::Shared, address, 16, &words, by)?;
            } else {
                block.shared.read(offset, 16, by, "matrix read")?;
                *row = block.shared.chunk(offset);
            }
        }
        block.counters.shared[statement as usize].count(&offsets, u32::MAX >> (32 - count), 16);
        if matrix.store {
            block.progress += 1;
            return Ok(());
        }
        for (i, r) in matrix.registers.iter().enumerate() {
            let values = &mut self.r32[*r as usize];
            for (lane, value) in values.iter_mut().enumerate() {
                *value = 0;
                for half in 0..2 {
                    let (row, column) = place(lane, half);
                    *value |= (rows[8 * i + row][column / 2] >> (16 * (column % 2)) & 0xffff) << (16 * half);
                }
            }
        }
        Ok(())
    }
}
