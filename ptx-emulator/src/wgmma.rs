//! `wgmma.mma_async`: descriptors, operand layouts, products in flight, and the arithmetic.
//!
//! Each warp of a warpgroup computes its own 16 rows when it issues the instruction. What makes that the same as computing later
//! is that everything a late computation would see is refused: a store or copy into memory that a product in flight reads, and
//! any use of its registers before the wait. A wait passes when all four warps have issued the products it waits for, because
//! the hardware runs them for the warpgroup as a whole.

use crate::alu::Lanes;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::float::f16_to_f32;
use crate::isa::{Half, Kernel, OperandA, SHARED_BASE, Wgmma};
use crate::shared::{self, Shared};
use crate::warp::Warp;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

/// Elements of k of one instruction.
const K: usize = 16;

/// A matrix in shared memory, as a descriptor and the instruction tell: `rows` (M or N) by 16 of k, in chunks of 16 bytes.
#[derive(Clone, Debug, PartialEq)]
struct Operand {
    start: usize,
    leading: usize,
    stride: usize,
    /// Bytes of a swizzled row: 16 (no swizzle), 32, 64 or 128.
    pitch: usize,
    /// M or N is contiguous in place of K.
    transpose: bool,
    rows: usize,
}

impl Operand {
    fn new(descriptor: u64, transpose: bool, rows: usize) -> Step<Operand> {
        let field = |low: u32| ((descriptor >> low & 0x3fff) << 4) as usize;
        if descriptor >> 49 & 7 != 0 {
            let what =
                format!("descriptor {descriptor:#x} has base offset {}: only 0 is emulated", descriptor >> 49 & 7);
            return Err(Trouble::new(FaultKind::Operand, what));
        }
        let pitch = match descriptor >> 62 {
            0 => 16,
            1 => 128,
            2 => 64,
            _ => 32,
        };
        Ok(Operand { start: field(0), leading: field(16), stride: field(32), pitch, transpose, rows })
    }

    /// Shared address of a chunk. K-major: `i` is the row, `j` the half of k. MN-major: `i` is k, `j` the block of 8 rows.
    ///
    /// Layouts of the PTX ISA ("strides"), T = 8 elements of 16 bits:
    /// K-major: 8 rows at the pitch, the next 8 at the stride offset; without swizzle the second half of k at the leading offset.
    /// MN-major: `pitch` bytes of rows at each k, k at the pitch, the next 8 k at the stride offset, the next rows at the leading
    /// offset; without swizzle these two change places.
    #[inline]
    fn address(&self, i: usize, j: usize) -> usize {
        let linear = if !self.transpose {
            let half = if self.pitch == 16 { self.leading } else { 16 };
            self.start + i / 8 * self.stride + i % 8 * self.pitch + j * half
        } else {
            let chunks = self.pitch / 16;
            let (rows, k) = if chunks == 1 { (self.stride, self.leading) } else { (self.leading, self.stride) };
            self.start + j / chunks * rows + j % chunks * 16 + i / 8 * k + i % 8 * self.pitch
        };
        // The swizzle is a function of address bits: bits 7 and up, as many as the pitch has, go into the chunk index.
        linear ^ (linear >> 3 & (self.pitch - 1) & !15)
    }

    /// Chunk indices: (rows, 2) or (16, rows / 8).
    fn extent(&self) -> (usize, usize) {
        if self.transpose { (K, self.rows / 8) } else { (self.rows, 2) }
    }

    fn chunks(&self) -> impl Iterator<Item = usize> {
        let (rows, columns) = self.extent();
        (0..rows).flat_map(move |i| (0..columns).map(move |j| self.address(i, j)))
    }

    /// Offsets in shared memory that hold all chunks, if they are inside.
    fn range(&self, shared: &Shared, name: &str) -> Step<Range> {
        let (low, high) = self.chunks().fold((usize::MAX, 0), |(low, high), at| (low.min(at), high.max(at + 16)));
        shared.offset(low as u64, high - low, 16, 0).map_err(|trouble| {
            let what = format!("matrix {name} (descriptor start {:#x}): {}", self.start, trouble.what);
            Trouble::new(trouble.kind, what)
        })?;
        Ok(Range { low: low - SHARED_BASE as usize, high: high - SHARED_BASE as usize })
    }
}

/// Offsets in shared memory.
#[derive(Clone, Copy, Debug)]
struct Range {
    low: usize,
    high: usize,
}

/// Matrix B in f32, for each 8 columns: 16 of k, each with columns 0, 2, 4, 6, 1, 3, 5, 7, the order in which the accumulators of
/// four lanes hold a row.
pub(crate) struct Panel {
    values: Vec<f32>,
    range: Range,
    version: u64,
}

/// Decoded B matrices, by descriptor, columns, order and type. A tile is used by every warpgroup.
#[derive(Default)]
pub(crate) struct Panels {
    known: HashMap<(u64, usize, bool, bool), Rc<Panel>>,
}

/// Most panels kept.
const PANELS: usize = 256;

/// A product that no wait has released.
pub(crate) struct Product {
    /// Operation and operands, which must be the same in all four warps.
    operation: usize,
    descriptors: (Option<u64>, u64),
    matrices: Vec<(Operand, Range)>,
    panel: Rc<Panel>,
    pub place: (u32, u32),
}

/// The products of four warps.
#[derive(Default)]
pub(crate) struct Warpgroup {
    /// In flight, oldest first; the first is number `released`.
    products: VecDeque<Product>,
    released: u64,
    /// Products issued by each warp.
    pub issued: [u64; 4],
}

impl Warpgroup {
    pub fn reset(&mut self) {
        *self = Warpgroup::default();
    }

    pub fn in_flight(&self) -> Option<&Product> {
        self.products.front()
    }

    /// Whether all warps have issued `products`.
    pub fn reached(&self, products: u64) -> bool {
        self.issued.iter().all(|issued| *issued >= products)
    }

    /// The first `products` are complete.
    pub fn release(&mut self, products: u64) {
        while self.released < products {
            self.products.pop_front();
            self.released += 1;
        }
    }

    /// Fails when a product in flight reads some of a range.
    pub fn check_write(&self, offset: usize, bytes: usize, doing: &str, kernel: &Kernel) -> Step {
        for product in &self.products {
            for (operand, range) in &product.matrices {
                if offset >= range.high || offset + bytes <= range.low {
                    continue;
                }
                let chunk = operand.chunks().map(|at| at - SHARED_BASE as usize);
                if let Some(at) = chunk.into_iter().find(|at| offset < at + 16 && *at < offset + bytes) {
                    let what = format!(
                        "{doing} of {bytes} bytes at shared {:#x} overwrites {:#x}, which the wgmma of line {} in flight \
                         still reads: no wgmma.wait_group released it",
                        shared::address(offset),
                        shared::address(at),
                        kernel.lines[product.place.1 as usize].line
                    );
                    return Err(Trouble::new(FaultKind::Race, what));
                }
            }
        }
        Ok(())
    }
}

/// The value that all lanes hold.
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

#[inline(always)]
fn decode(chunk: [u32; 4], half: Half) -> [f32; 8] {
    std::array::from_fn(|i| {
        let bits = chunk[i / 2] >> (16 * (i % 2)) & 0xffff;
        match half {
            Half::Bf16 => f32::from_bits(bits << 16),
            Half::F16 => f16_to_f32(bits),
        }
    })
}

/// Place of a column in its group of 8.
const PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

fn panel(shared: &Shared, operand: &Operand, half: Half) -> Vec<f32> {
    let mut values = vec![0f32; operand.rows * K];
    let (rows, columns) = operand.extent();
    for i in 0..rows {
        for j in 0..columns {
            let chunk = decode(shared.chunk(operand.address(i, j) - SHARED_BASE as usize), half);
            if operand.transpose {
                let to = &mut values[j * 8 * K + i * 8..][..8];
                chunk.iter().zip(PLACE).for_each(|(value, place)| to[place] = *value);
            } else {
                let to = &mut values[i / 8 * 8 * K + PLACE[i % 8] + j * 64..];
                chunk.iter().enumerate().for_each(|(k, value)| to[k * 8] = *value);
            }
        }
    }
    values
}

/// Rows `first` to `first + 16` of A in f32.
fn rows_of_a(shared: &Shared, operand: &Operand, first: usize, half: Half) -> [[f32; K]; 16] {
    let mut a = [[0f32; K]; 16];
    if operand.transpose {
        for k in 0..K {
            for block in 0..2 {
                let at = operand.address(k, first / 8 + block) - SHARED_BASE as usize;
                decode(shared.chunk(at), half).iter().enumerate().for_each(|(i, value)| a[8 * block + i][k] = *value);
            }
        }
    } else {
        for (row, values) in a.iter_mut().enumerate() {
            for j in 0..2 {
                let at = operand.address(first + row, j) - SHARED_BASE as usize;
                values[8 * j..8 * j + 8].copy_from_slice(&decode(shared.chunk(at), half));
            }
        }
    }
    a
}

/// A from four registers a lane: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8), row = lane / 4, k = 2 (lane % 4).
fn registers_of_a(registers: [&Lanes<u32>; 4], half: Half) -> [[f32; K]; 16] {
    let mut a = [[0f32; K]; 16];
    for (i, register) in registers.iter().enumerate() {
        for (lane, bits) in register.iter().enumerate() {
            let pair = decode([*bits, 0, 0, 0], half);
            let (row, k) = (lane / 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i / 2));
            (a[row][k], a[row][k + 1]) = (pair[0], pair[1]);
        }
    }
    a
}

/// Adds A times the columns of G groups to their accumulators.
#[inline(always)]
fn tile<const G: usize>(d: &mut [Lanes<f32>], a: &[[f32; K]; 16], panel: &[f32]) {
    for quad in 0..4 {
        let (half, first) = (quad / 2, quad % 2 * 4);
        let mut sums = [[[0f32; 8]; G]; 4];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (group, sum) in sums.iter_mut().enumerate() {
                let lane = 4 * (first + row);
                sum[..4].copy_from_slice(&d[4 * group + 2 * half][lane..lane + 4]);
                sum[4..].copy_from_slice(&d[4 * group + 2 * half + 1][lane..lane + 4]);
            }
        }
        for k in 0..K {
            let columns: [[f32; 8]; G] =
                std::array::from_fn(|group| std::array::from_fn(|i| panel[group * 8 * K + 8 * k + i]));
            for (row, sums) in sums.iter_mut().enumerate() {
                let factor = a[4 * quad + row][k];
                for (sum, column) in sums.iter_mut().zip(&columns) {
                    for (sum, column) in sum.iter_mut().zip(column) {
                        *sum = factor.mul_add(*column, *sum);
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (group, sum) in sums.iter().enumerate() {
                let lane = 4 * (first + row);
                d[4 * group + 2 * half][lane..lane + 4].copy_from_slice(&sum[..4]);
                d[4 * group + 2 * half + 1][lane..lane + 4].copy_from_slice(&sum[4..]);
            }
        }
    }
}

#[inline(always)]
fn multiply_groups(d: &mut [Lanes<f32>], a: &[[f32; K]; 16], panel: &[f32]) {
    let groups = d.len() / 4;
    for group in (0..groups).step_by(2) {
        let panel = &panel[group * 8 * K..];
        if group + 1 < groups {
            tile::<2>(&mut d[4 * group..4 * group + 8], a, panel);
        } else {
            tile::<1>(&mut d[4 * group..4 * group + 4], a, panel);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_avx2(d: &mut [Lanes<f32>], a: &[[f32; K]; 16], panel: &[f32]) {
    multiply_groups(d, a, panel);
}

/// `d += a b`, d as N / 2 accumulators.
fn multiply(d: &mut [Lanes<f32>], a: &[[f32; K]; 16], panel: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the CPU was just found to have the features that the function is compiled for.
        return unsafe { multiply_avx2(d, a, panel) };
    }
    multiply_groups(d, a, panel);
}

/// One warp issues a product: all its lanes are active.
pub(crate) fn issue(block: &mut Block, warp: &mut Warp, op: &Wgmma, operation: usize, statement: u32) -> Step {
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
        return Err(Trouble::new(FaultKind::Operand, format!("scale-d differs between lanes: {scale:#x}")));
    }
    let number = block.warpgroups[group].issued[rank];
    let at = (number - block.warpgroups[group].released) as usize;
    match block.warpgroups[group].products.get(at) {
        None => {
            let product = start(block, op, (a_descriptor, b_descriptor), operation, (warp.index as u32, statement))?;
            block.warpgroups[group].products.push_back(product);
        }
        Some(product) if product.operation != operation || product.descriptors != (a_descriptor, b_descriptor) => {
            let what = format!(
                "warp {} of the warpgroup issued the wgmma of line {} as its product {number}, with descriptors {:#x?}; \
                 this warp issues another, with {:#x?}",
                product.place.0,
                block.kernel.lines[product.place.1 as usize].line,
                product.descriptors,
                (a_descriptor, b_descriptor)
            );
            return Err(Trouble::new(FaultKind::Divergence, what));
        }
        Some(_) => {}
    }
    let warpgroup = &mut block.warpgroups[group];
    warpgroup.issued[rank] += 1;
    let product = &warpgroup.products[at];
    warp.fragments_issue(op, number + 1)?;

    let mut a = match op.a {
        OperandA::Descriptor(_) => rows_of_a(&block.shared, &product.matrices[1].0, 16 * rank, op.half),
        OperandA::Registers(r) => registers_of_a(r.map(|r| &warp.r32[r as usize]), op.half),
    };
    if op.negate_a != op.negate_b {
        a.iter_mut().flatten().for_each(|value| *value = -*value);
    }
    let mut d: Vec<Lanes<f32>> = if scale == 0 {
        vec![[0.0; 32]; op.d.len()]
    } else {
        op.d.iter().map(|r| warp.r32[*r as usize].map(f32::from_bits)).collect()
    };
    multiply(&mut d, &a, &product.panel.values);
    for (r, lanes) in op.d.iter().zip(&d) {
        warp.r32[*r as usize] = lanes.map(f32::to_bits);
    }
    block.counters.products += (16 * op.n * K) as u64;
    block.progress += 1;
    Ok(())
}

/// The first warp of a warpgroup to issue a product: checks its operands and decodes B.
fn start(
    block: &mut Block,
    op: &Wgmma,
    descriptors: (Option<u64>, u64),
    operation: usize,
    place: (u32, u32),
) -> Step<Product> {
    let warp = place.0 as usize;
    let b = Operand::new(descriptors.1, op.transpose_b, op.n)?;
    let key = (descriptors.1, op.n, op.transpose_b, op.half == Half::Bf16);
    let known = block
        .panels
        .known
        .get(&key)
        .filter(|panel| panel.version == block.shared.version(panel.range.low, panel.range.high - panel.range.low));
    let panel = match known {
        Some(panel) => panel.clone(),
        None => {
            let range = b.range(&block.shared, "B")?;
            for at in b.chunks() {
                block.shared.readable_by_proxy(at - SHARED_BASE as usize, 16, warp, "wgmma read of matrix B")?;
            }
            let version = block.shared.version(range.low, range.high - range.low);
            let panel = Rc::new(Panel { values: panel(&block.shared, &b, op.half), range, version });
            if block.panels.known.len() >= PANELS {
                block.panels.known.clear();
            }
            block.panels.known.insert(key, panel.clone());
            panel
        }
    };
    let mut matrices = vec![(b, panel.range)];
    if let Some(descriptor) = descriptors.0 {
        let a = Operand::new(descriptor, op.transpose_a, 64)?;
        let range = a.range(&block.shared, "A")?;
        for at in a.chunks() {
            block.shared.readable_by_proxy(at - SHARED_BASE as usize, 16, warp, "wgmma read of matrix A")?;
        }
        matrices.push((a, range));
    }
    Ok(Product { operation, descriptors, matrices, panel, place })
}
