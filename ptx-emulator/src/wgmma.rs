//! `wgmma.mma_async`: descriptors, operand layouts and products in flight.
//!
//! Each warp of a warpgroup computes its own 16 rows when it issues the instruction. What makes that the same as computing later
//! is that everything a late computation would see is refused: a store or copy into memory that a product in flight reads, and
//! any use of its registers before the wait. A wait passes when all four warps have issued the products it waits for, because
//! the hardware runs them for the warpgroup as a whole. It releases the registers of its own warp; the memory is released when
//! all four warps have waited, and to those who are ordered after all four waits.

use crate::alu::Lanes;
use crate::block::Block;
use crate::fault::{FaultKind, Step, Trouble};
use crate::float::f16_to_f32;
use crate::isa::{Half, OperandA, SHARED_BASE, Wgmma};
use crate::race::{Access, By, Clocks, check_proxy_read};
use crate::shared::{self, Shared};
use crate::tensor_core::{Columns, K, Rows, multiply};
use crate::warp::Warp;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

/// A matrix in shared memory, as a descriptor and the instruction tell: `rows` (M or N) by 16 of k, in chunks of 16 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
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

impl Range {
    /// Each KiB that it meets.
    fn pages(self) -> std::ops::Range<usize> {
        self.low / 1024..self.high.div_ceil(1024)
    }
}

/// A matrix decoded from shared memory, which holds as long as nothing in its range changes.
struct Decoded<T> {
    values: Vec<T>,
    range: Range,
    version: u64,
    /// Who wrote it.
    writers: Vec<Access>,
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

/// A product that not all warps have waited for.
pub(crate) struct Product {
    /// Operation and operands, which must be the same in all four warps.
    operation: usize,
    descriptors: (Option<u64>, u64),
    /// Indices in [`Warpgroup::matrices`]: B, and A unless in registers.
    matrices: [Option<usize>; 2],
    /// `None`: A in registers.
    a: Option<Rc<Decoded<Rows>>>,
    b: Rc<Decoded<Columns>>,
    /// The first warp that issued it.
    pub by: By,
}

/// Reads by products.
#[derive(Clone, Copy, Default)]
struct Reads {
    /// Products in flight.
    in_flight: u32,
    /// Own times of the four warps when they last waited for one.
    times: [u32; 4],
}

impl Reads {
    /// The rank of a warp whose last wait `by` does not know.
    #[inline]
    fn unknown(&self, clocks: &Clocks, first: usize, by: By) -> Option<usize> {
        (0..4).find(|rank| !clocks.knows(by, first + rank, self.times[*rank]))
    }
}

/// A matrix that products have read.
struct Matrix {
    operand: Operand,
    range: Range,
    reads: Reads,
    /// The last of them.
    statement: u32,
}

/// The products of four warps.
#[derive(Default)]
pub(crate) struct Warpgroup {
    /// Its first warp.
    first: usize,
    /// In flight, oldest first; the first is number `released`.
    products: VecDeque<Product>,
    released: u64,
    /// Products issued by each warp, and those it has waited for.
    pub issued: [u64; 4],
    waited: [u64; 4],
    /// All that products have read.
    matrices: Vec<Matrix>,
    known: HashMap<Operand, usize>,
    /// The reads that meet each KiB.
    pages: Vec<Reads>,
}

impl Warpgroup {
    pub fn new(index: usize) -> Warpgroup {
        Warpgroup { first: 4 * index, ..Warpgroup::default() }
    }

    pub fn reset(&mut self) {
        *self = Warpgroup::new(self.first / 4);
    }

    pub fn in_flight(&self) -> Option<&Product> {
        self.products.front()
    }

    /// Whether all warps have issued `products`.
    pub fn reached(&self, products: u64) -> bool {
        self.issued.iter().all(|issued| *issued >= products)
    }

    /// A product that reads a matrix has started; returns the matrix's index.
    fn start_read(&mut self, operand: Operand, range: Range, statement: u32) -> usize {
        let index = *self.known.entry(operand).or_insert_with_key(|operand| {
            self.matrices.push(Matrix { operand: operand.clone(), range, reads: Reads::default(), statement });
            self.matrices.len() - 1
        });
        self.matrices[index].statement = statement;
        self.matrices[index].reads.in_flight += 1;
        self.pages.resize(self.pages.len().max(range.pages().end), Reads::default());
        self.pages[range.pages()].iter_mut().for_each(|reads| reads.in_flight += 1);
        index
    }

    /// A warp, at a time of its own, has waited for the first `products`. They are complete when all four warps have.
    pub fn release(&mut self, warp: usize, products: u64, now: u32) {
        let rank = warp - self.first;
        for number in self.waited[rank]..products {
            for index in self.products[(number - self.released) as usize].matrices.into_iter().flatten() {
                let matrix = &mut self.matrices[index];
                matrix.reads.times[rank] = now;
                self.pages[matrix.range.pages()].iter_mut().for_each(|reads| reads.times[rank] = now);
            }
        }
        self.waited[rank] = self.waited[rank].max(products);
        let complete = self.waited.into_iter().min().unwrap_or(0);
        while self.released < complete {
            let product = self.products.pop_front().expect("all have issued what they waited for");
            for index in product.matrices.into_iter().flatten() {
                let matrix = &mut self.matrices[index];
                matrix.reads.in_flight -= 1;
                self.pages[matrix.range.pages()].iter_mut().for_each(|reads| reads.in_flight -= 1);
            }
            self.released += 1;
        }
    }

    /// Fails when a product in flight reads some of a range, or the writer does not know that all four warps have waited for one
    /// that did.
    #[inline]
    pub fn check_write(&self, clocks: &Clocks, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        let touched = Range { low: offset, high: offset + bytes };
        let pages = touched.pages();
        let pages = self.pages.get(pages.start..pages.end.min(self.pages.len())).unwrap_or_default();
        let harmless = |reads: &Reads| reads.in_flight == 0 && reads.unknown(clocks, self.first, by).is_none();
        if pages.iter().all(harmless) { Ok(()) } else { self.check_matrices(clocks, touched, by, doing) }
    }

    /// [`Warpgroup::check_write`] by each chunk of each matrix.
    fn check_matrices(&self, clocks: &Clocks, touched: Range, by: By, doing: &str) -> Step {
        for Matrix { operand, range, reads, statement } in &self.matrices {
            let unknown = reads.unknown(clocks, self.first, by);
            if touched.high <= range.low || range.high <= touched.low || reads.in_flight == 0 && unknown.is_none() {
                continue;
            }
            let mut chunks = operand.chunks().map(|at| at - SHARED_BASE as usize);
            let Some(at) = chunks.find(|at| touched.low < at + 16 && *at < touched.high) else { continue };
            let why = if reads.in_flight > 0 {
                "a product in flight still reads: no wgmma.wait_group released it in all four warps"
            } else {
                "a product has read, and no barrier orders it after that product's wgmma.wait_group in all four warps"
            };
            let what = format!(
                "{doing} of {} bytes at shared {:#x} overwrites {:#x}, which {why}; the product is that of",
                touched.high - touched.low,
                shared::address(touched.low),
                shared::address(at),
            );
            let product = By { warp: self.first + unknown.unwrap_or(0), lane: None, statement: *statement };
            return Err(Trouble::by(FaultKind::Race, by, what).other(product));
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
        return Err(Trouble::new(FaultKind::Operand, format!("scale-d differs between lanes: {scale:#x}")));
    }
    let number = block.warpgroups[group].issued[rank];
    let at = (number - block.warpgroups[group].released) as usize;
    match block.warpgroups[group].products.get(at) {
        None => {
            let product = start(block, op, (a_descriptor, b_descriptor), operation, by)?;
            block.warpgroups[group].products.push_back(product);
        }
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

/// The first warp of a warpgroup to issue a product: checks its operands and decodes them.
fn start(block: &mut Block, op: &Wgmma, descriptors: (Option<u64>, u64), operation: usize, by: By) -> Step<Product> {
    let (shared, bf16) = (&block.shared, op.half == Half::Bf16);
    let warpgroup = &mut block.warpgroups[by.warp / 4];
    let key = (descriptors.1, op.n, op.transpose_b, bf16);
    let (matrix, b) = look_up(shared, &mut block.panels.b, key, "B", by, |m| columns_of_b(shared, m, op.half))?;
    let mut matrices = [Some(warpgroup.start_read(matrix, b.range, by.statement)), None];
    let mut a = None;
    if let Some(descriptor) = descriptors.0 {
        let key = (descriptor, 64, op.transpose_a, bf16);
        let (matrix, decoded) = look_up(shared, &mut block.panels.a, key, "A", by, |m| rows_of_a(shared, m, op.half))?;
        matrices[1] = Some(warpgroup.start_read(matrix, decoded.range, by.statement));
        a = Some(decoded);
    }
    Ok(Product { operation, descriptors, matrices, a, b, by })
}

/// The matrix that a key describes, decoded anew if its memory has changed; its bytes must be readable by the product.
fn look_up<T>(
    shared: &Shared,
    known: &mut HashMap<Key, Rc<Decoded<T>>>,
    key: Key,
    name: &str,
    by: By,
    decode: impl Fn(&Operand) -> Vec<T>,
) -> Step<(Operand, Rc<Decoded<T>>)> {
    let (descriptor, rows, transpose, _) = key;
    let operand = Operand::new(descriptor, transpose, rows)?;
    let version = |range: Range| shared.version(range.low, range.high - range.low);
    let doing = || format!("wgmma read of matrix {name}");
    if let Some(decoded) = known.get(&key)
        && decoded.version == version(decoded.range)
    {
        check_proxy_read(&shared.clocks, &decoded.writers, by, doing)?;
        return Ok((operand, decoded.clone()));
    }
    let range = operand.range(shared, name)?;
    let mut writers = Vec::new();
    let text = doing();
    for at in operand.chunks() {
        shared.readable_by_proxy(at - SHARED_BASE as usize, 16, by, &text, &mut writers)?;
    }
    let decoded = Rc::new(Decoded { values: decode(&operand), range, version: version(range), writers });
    if known.len() >= KEPT {
        known.clear();
    }
    known.insert(key, decoded.clone());
    Ok((operand, decoded))
}
