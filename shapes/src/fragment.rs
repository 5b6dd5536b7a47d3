//! Which element of a tensor-core tile a register holds. `no_std`.
//!
//! A warpgroup's accumulator has 64 rows, 16 for each of its four warps, and as many columns as the
//! product. The thread of lane t holds two rows of its warp, `t / 4` and `t / 4 + 8`. Of each group
//! of 8 columns it holds the two that begin at `2 (t % 4)`. Of a tile of keys, columns are keys.
//! The four lanes that hold parts of the same rows are a **quad**.
//!
//! ```text
//! registers of a thread, group by group of 8 columns:
//!            group 0      group 1      group 2
//! row 0      0   1        4   5        8   9
//! row 1      2   3        6   7       10  11   ...
//! ```
//!
//! (PTX ISA 9.7.15.5.1.1, register fragments of wgmma.m64nNk16.)

use crate::layout::Visible;

/// The two rows of the thread of lane `lane`, `first_row` being its warp's first.
#[inline(always)]
pub const fn thread_rows(first_row: u32, lane: u32) -> [u32; 2] {
    [first_row + lane / 4, first_row + lane / 4 + 8]
}

/// The first of the two columns that the thread of lane `lane` holds in group 0.
#[inline(always)]
pub const fn first_column(lane: u32) -> u32 {
    2 * (lane % 4)
}

/// Which of the thread's two rows register `index` belongs to.
#[inline(always)]
pub const fn row_of(index: u32) -> usize {
    (index / 2 % 2) as usize
}

/// Which of the columns that the thread holds in a row register `index` belongs to, two in each
/// group.
#[inline(always)]
pub const fn column_of(index: u32) -> u32 {
    index / 4 * 2 + index % 2
}

/// The keys of a tile that a row sees, as far as one thread holds them. Bit [`column_of`] of a
/// register is set if its key is seen.
///
/// `row` is what the row sees. The tile has `tile_rows` keys (a multiple of 8 below 256) from
/// packed row `first` on.
#[inline(always)]
pub const fn seen_keys(row: Visible, first: u32, tile_rows: u32, lane: u32) -> u64 {
    /// The keys before packed row `bound`.
    #[inline(always)]
    const fn before(bound: u32, first: u32, tile_rows: u32) -> u64 {
        let rows = bound.saturating_sub(first);
        let rows = if rows < tile_rows { rows } else { tile_rows };
        let odd = if rows % 8 < 2 { rows % 8 } else { 2 };
        (1 << (rows / 8 * 2 + odd)) - 1
    }
    let first = first + first_column(lane);
    before(row.prefix, first, tile_rows) | (before(row.end, first, tile_rows) & !before(row.start, first, tile_rows))
}

/// The same keys of a tile of 64, taken from those of a whole row of 64 keys ([`Visible::keys`]).
#[inline(always)]
pub const fn thread_keys(keys: u64, lane: u32) -> u64 {
    /// The lowest two bits of each byte, together: the product has byte b's at 18 + 2 b, where no
    /// other term is.
    #[inline(always)]
    const fn gather(word: u32) -> u32 {
        (word & 0x0303_0303).wrapping_mul(1 | 1 << 6 | 1 << 12 | 1 << 18) >> 18 & 0xff
    }
    let [low, high] = [keys as u32, (keys >> 32) as u32];
    (gather(low >> first_column(lane)) | gather(high >> first_column(lane)) << 8) as u64
}
