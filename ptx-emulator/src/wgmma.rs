//! `wgmma.mma_async`: descriptors, operand layouts and products in flight.
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
use crate::tensor_core::{Columns, K, Rows, multiply};
use crate::warp::Warp;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

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

/// A matrix decoded from shared memory, which holds as long as nothing in its range changes.
struct Decoded<T> {
    values: Vec<T>,
    range: Range,
    version: u64,
}

/// Decoded matrices by descriptor, rows, order and type: a tile of K or V is used by every warpgroup, one of Q many times.
#[derive(Default)]
pub(crate) struct Panels {
    a: HashMap<Key, Rc<Decoded<Rows>>>,
    b: HashMap<Key, Rc<Decoded<Columns>>>,
}

/// Descriptor, rows (M or N), M or N contiguous, bf16.
type Key = (u64, usize, bool, bool);

/// Most matrices of a kind that are kept.
const KEPT: usize = 256;

/// A product that no wait has released.
pub(crate) struct Product {
    /// Operation and operands, which must be the same in all four warps.
    operation: usize,
    descriptors: (Option<u64>, u64),
    matrices: Vec<(Operand, Range)>,
    /// `None`: A in registers.
    a: Option<Rc<Decoded<Rows>>>,
    b: Rc<Decoded<Columns>>,
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

fn columns_of_b(shared: &Shared, operand: &Operand, half: Half) -> Vec<Columns> {
    let mut values = vec![Columns::ZERO; operand.rows / 8];
    let (rows, columns) = operand.extent();
    for i in 0..rows {
        for j in 0..columns {
            let chunk = decode(shared.chunk(operand.address(i, j) - SHARED_BASE as usize), half);
            for (n, value) in chunk.into_iter().enumerate() {
                if operand.transpose {
                    values[j].set(i, PLACE[n], value, half);
                } else {
                    values[i / 8].set(8 * j + n, PLACE[i % 8], value, half);
                }
            }
        }
    }
    values
}

fn rows_of_a(shared: &Shared, operand: &Operand, half: Half) -> Vec<Rows> {
    let mut values = vec![Rows::ZERO; operand.rows / 16];
    let (rows, columns) = operand.extent();
    for i in 0..rows {
        for j in 0..columns {
            let chunk = decode(shared.chunk(operand.address(i, j) - SHARED_BASE as usize), half);
            for (n, value) in chunk.into_iter().enumerate() {
                if operand.transpose {
                    values[j / 2].set(j % 2 * 8 + n, i, value, half);
                } else {
                    values[i / 16].set(i % 16, 8 * j + n, value, half);
                }
            }
        }
    }
    values
}

/// A from four registers a lane: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8), row = lane / 4, k = 2 (lane % 4).
fn registers_of_a(registers: [&Lanes<u32>; 4], half: Half) -> Rows {
    let mut a = Rows::ZERO;
    for (i, register) in registers.iter().enumerate() {
        for (lane, bits) in register.iter().enumerate() {
            let pair = decode([*bits, 0, 0, 0], half);
            let (row, k) = (lane / 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i / 2));
            a.set(row, k, pair[0], half);
            a.set(row, k + 1, pair[1], half);
        }
    }
    a
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

    let in_registers;
    let mut a = match (op.a, &product.a) {
        (OperandA::Registers(r), _) => {
            in_registers = registers_of_a(r.map(|r| &warp.r32[r as usize]), op.half);
            &in_registers
        }
        (_, a) => &a.as_ref().expect("a product with a descriptor has A").values[rank],
    };
    let negated;
    if op.negate_a != op.negate_b {
        negated = a.negated();
        a = &negated;
    }
    if scale == 0 {
        op.d.iter().for_each(|r| warp.r32[*r as usize] = [0; 32]);
    }
    multiply(&mut warp.r32, &op.d, a, &product.b.values);
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
    let (shared, bf16) = (&block.shared, op.half == Half::Bf16);
    let (b_matrix, b) =
        look_up(shared, &mut block.panels.b, (descriptors.1, op.n, op.transpose_b, bf16), "B", warp, |m| {
            columns_of_b(shared, m, op.half)
        })?;
    let mut matrices = vec![(b_matrix, b.range)];
    let mut a = None;
    if let Some(descriptor) = descriptors.0 {
        let key = (descriptor, 64, op.transpose_a, bf16);
        let (matrix, decoded) =
            look_up(shared, &mut block.panels.a, key, "A", warp, |m| rows_of_a(shared, m, op.half))?;
        matrices.push((matrix, decoded.range));
        a = Some(decoded);
    }
    Ok(Product { operation, descriptors, matrices, a, b, place })
}

/// The matrix that a key describes, decoded anew if its memory has changed; its bytes must be readable by the product.
fn look_up<T>(
    shared: &Shared,
    known: &mut HashMap<Key, Rc<Decoded<T>>>,
    key: Key,
    name: &str,
    warp: usize,
    decode: impl Fn(&Operand) -> Vec<T>,
) -> Step<(Operand, Rc<Decoded<T>>)> {
    let (descriptor, rows, transpose, _) = key;
    let operand = Operand::new(descriptor, transpose, rows)?;
    let version = |range: Range| shared.version(range.low, range.high - range.low);
    if let Some(decoded) = known.get(&key)
        && decoded.version == version(decoded.range)
    {
        return Ok((operand, decoded.clone()));
    }
    let range = operand.range(shared, name)?;
    let doing = format!("wgmma read of matrix {name}");
    for at in operand.chunks() {
        shared.readable_by_proxy(at - SHARED_BASE as usize, 16, warp, &doing)?;
    }
    let decoded = Rc::new(Decoded { values: decode(&operand), range, version: version(range) });
    if known.len() >= KEPT {
        known.clear();
    }
    known.insert(key, decoded.clone());
    Ok((operand, decoded))
}
