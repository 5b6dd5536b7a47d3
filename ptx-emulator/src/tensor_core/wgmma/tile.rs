//! Matrices in shared memory, as descriptors tell of them, and their decoded values.

use super::{ElementType, M, Product};
use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::SHARED_BASE;
use crate::race::{Access, By, check_proxy_read};
use crate::shared::Shared;
use crate::tensor_core::fragment::even_before_odd;
use crate::tensor_core::sums::{Columns, Rows};
use std::collections::HashMap;
use std::rc::Rc;

/// A matrix in shared memory: `rows` of M or N, by 32 bytes of k, in chunks of 16 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    start: usize,
    leading: usize,
    stride: usize,
    /// Bytes of a swizzled row: 16 (no swizzle), 32, 64 or 128.
    pitch: usize,
    /// Whether M or N is contiguous, in place of K. Elements then have 16 bits.
    transpose: bool,
    rows: usize,
}

/// The address of a chunk in a tile whose rows have `pitch` bytes: 16 (no swizzle), 32, 64 or 128.
///
/// The hardware moves the chunks of 16 bytes within each row, so that equal chunks of eight rows
/// lie in different banks. Address bits from bit 7 on are exclusive-ored into the index of the
/// chunk, as many bits as the index has. With a pitch of 128 bytes, these chunks of each row lie
/// side by side:
///
/// ```text
/// byte    0  16  32  48  64  80  96 112
/// row 0   0   1   2   3   4   5   6   7
/// row 1   1   0   3   2   5   4   7   6
/// row 2   2   3   0   1   6   7   4   5
/// ...
/// row 7   7   6   5   4   3   2   1   0
/// ```
#[inline]
fn swizzle(address: usize, pitch: usize) -> usize {
    address ^ (address >> 3 & (pitch - 1) & !15)
}

impl Tile {
    /// Takes a descriptor apart:
    ///
    /// ```text
    /// bit   0 to 13   start address / 16
    ///      16 to 29   leading offset / 16
    ///      32 to 45   stride offset / 16
    ///      49 to 51   base offset
    ///      62 to 63   swizzle: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes
    /// ```
    fn new(descriptor: u64, transpose: bool, rows: usize) -> Step<Tile> {
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
        Ok(Tile { start: field(0), leading: field(16), stride: field(32), pitch, transpose, rows })
    }

    /// The shared address of a chunk. K-major: `i` is the row, and `j` the half of k. MN-major: `i`
    /// is k, and `j` counts blocks of 8 rows.
    ///
    /// The layouts are those of the PTX ISA ("strides"). This is how far apart neighbours lie:
    ///
    /// | step | K-major | MN-major |
    /// | --- | --- | --- |
    /// | one `i` on | the pitch | the pitch |
    /// | 8 of `i` on | the stride offset | the stride offset |
    /// | one `j` on | 16 bytes | 16 bytes |
    /// | `pitch` / 16 of `j` on | not met | the leading offset |
    ///
    /// Without swizzle, the second half of k of a K-major tile lies at the leading offset. In an
    /// MN-major tile, leading and stride offset then change places.
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
        swizzle(linear, self.pitch)
    }

    /// How many `i` and `j` there are.
    fn extent(&self) -> (usize, usize) {
        if self.transpose { (16, self.rows / 8) } else { (self.rows, 2) }
    }

    /// The offset of each chunk in shared memory, with its `i` and `j`.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (rows, columns) = self.extent();
        (0..rows).flat_map(move |i| (0..columns).map(move |j| (i, j, self.address(i, j) - SHARED_BASE as usize)))
    }

    /// The offset of the first chunk that has bytes in a range.
    pub fn chunk_in(&self, range: Range) -> Option<usize> {
        self.chunks().map(|(.., at)| at).find(|at| range.low < at + 16 && *at < range.high)
    }

    /// The offsets that hold all chunks; a fault if they are not inside the block's shared memory.
    fn range(&self, shared: &Shared, name: &str) -> Step<Range> {
        let (rows, columns) = self.extent();
        let addresses = (0..rows).flat_map(|i| (0..columns).map(move |j| self.address(i, j)));
        let (low, high) = addresses.fold((usize::MAX, 0), |(low, high), at| (low.min(at), high.max(at + 16)));
        shared.offset(low as u64, high - low, 16, 0).map_err(|trouble| {
            let what = format!("matrix {name} (descriptor start {:#x}): {}", self.start, trouble.what);
            Trouble::new(trouble.kind, what)
        })?;
        Ok(Range { low: low - SHARED_BASE as usize, high: high - SHARED_BASE as usize })
    }

    /// All values, each with its row and its k.
    #[inline(always)]
    fn values(&self, shared: &Shared, element: ElementType, mut see: impl FnMut(usize, usize, f32)) {
        let count = element.per_register();
        for (i, j, at) in self.chunks() {
            for (register, bits) in shared.chunk(at).into_iter().enumerate() {
                for n in 0..count {
                    let along = count * (4 * j + register) + n;
                    let (row, k) = if self.transpose { (along, i) } else { (i, along) };
                    see(row, k, element.value(bits, n));
                }
            }
        }
    }
}

/// Offsets in shared memory, from `low` to before `high`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub low: usize,
    pub high: usize,
}

impl Range {
    /// Each KiB that has bytes in the range.
    pub fn pages(self) -> std::ops::Range<usize> {
        self.low / 1024..self.high.div_ceil(1024)
    }
}

/// The values of a tile. They hold as long as nothing in its range changes.
pub(super) struct Decoded<T> {
    pub values: Vec<T>,
    pub range: Range,
    version: u64,
    /// The stores and copies that wrote it.
    pub writers: Vec<Access>,
}

/// What tells one decoded tile from another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    descriptor: u64,
    rows: usize,
    transpose: bool,
    element: ElementType,
}

type Known<T> = HashMap<Key, Rc<Decoded<T>>>;

/// Decoded tiles of a block. A tile of keys or values is used by every warpgroup, one of queries
/// many times: decoding it once saves most of the time.
#[derive(Default)]
pub(crate) struct Tiles {
    a: Known<Rows>,
    b: Known<Columns>,
}

/// Most decoded tiles of A, and of B, that are kept.
const KEPT: usize = 256;

impl Tiles {
    /// Every k of the columns of B, one group of eight after the other, and where they lie.
    pub(super) fn columns_of_b(
        &mut self,
        shared: &Shared,
        op: &Product,
        descriptor: u64,
        by: By,
    ) -> Step<(Tile, Rc<Decoded<Columns>>)> {
        let key = Key { descriptor, rows: op.n, transpose: op.transpose_b, element: op.element };
        look_up(shared, &mut self.b, key, "B", by, |tile| {
            let count = key.element.k();
            let mut values = vec![Columns::ZERO; tile.rows / 8 * count];
            tile.values(shared, key.element, |column, k, value| {
                values[column / 8 * count + k].set(even_before_odd(column % 8), value, key.element);
            });
            values
        })
    }

    /// Every k of the rows of A, one group of sixteen after the other, and where they lie.
    pub(super) fn rows_of_a(
        &mut self,
        shared: &Shared,
        op: &Product,
        descriptor: u64,
        by: By,
    ) -> Step<(Tile, Rc<Decoded<Rows>>)> {
        let key = Key { descriptor, rows: M, transpose: op.transpose_a, element: op.element };
        look_up(shared, &mut self.a, key, "A", by, |tile| {
            let count = key.element.k();
            let mut values = vec![Rows::ZERO; tile.rows / 16 * count];
            tile.values(shared, key.element, |row, k, value| {
                values[row / 16 * count + k].set(row % 16, value, key.element);
            });
            values
        })
    }
}

/// The tile of a key, decoded anew if its memory has changed. A fault if the product may not read
/// it.
fn look_up<T>(
    shared: &Shared,
    known: &mut Known<T>,
    key: Key,
    name: &str,
    by: By,
    decode: impl Fn(&Tile) -> Vec<T>,
) -> Step<(Tile, Rc<Decoded<T>>)> {
    let tile = Tile::new(key.descriptor, key.transpose, key.rows)?;
    let version = |range: Range| shared.version(range.low, range.high - range.low);
    let doing = || format!("wgmma read of matrix {name}");
    if let Some(decoded) = known.get(&key)
        && decoded.version == version(decoded.range)
    {
        check_proxy_read(&shared.clocks, &decoded.writers, by, doing)?;
        return Ok((tile, decoded.clone()));
    }
    let range = tile.range(shared, name)?;
    let mut writers = Vec::new();
    let text = doing();
    for (.., at) in tile.chunks() {
        shared.readable_by_proxy(at, 16, by, &text, &mut writers)?;
    }
    let decoded = Rc::new(Decoded { values: decode(&tile), range, version: version(range), writers });
    if known.len() >= KEPT {
        known.clear();
    }
    known.insert(key, decoded.clone());
    Ok((tile, decoded))
}
