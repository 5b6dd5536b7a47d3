//! Softmax whose weights become e4m3.
//!
//! e4m3 holds weights from 2^-6 to 448 with three bits, and loses what is below 2^-10. That is too
//! little for all keys of a row: many small weights may come to more than a few large ones. So each
//! key tile can have an **offset** of its own, with which its weights lie in that range. Its
//! products are in an accumulator of their own, and are multiplied by a **factor** when they are
//! added to the row's output. All that was added has one offset, the **base**.
//!
//! No maximum is looked for. The sum of a tile's weights says whether they are in range. A row
//! begins with the offset 0, and keeps an offset until a tile does not fit. Only then is that tile's
//! maximum looked for.

use super::max_of_rows;
use crate::cuda::mma::{ByteWeights, Fragment};
use crate::cuda::{math, thread, warp};
use framestride_shapes::fragment::row_of;

/// The most that a thread's weights of a row and a tile may sum up to. None of them is larger then,
/// and this is the largest e4m3.
const MOST: f32 = 448.0;

/// The least mean that the visible weights of a row and a tile may have. What e4m3 loses of each,
/// 2^-10, is a 32nd of it.
pub const LEAST_MEAN: f32 = 1.0 / 32.0;

/// log2 of the weight that a tile's maximum gets. If all keys have the maximum, a thread's sum is
/// 128. So weights may grow and shrink in the tiles that follow.
const HEADROOM: f32 = 2.0;

/// Offsets and sums of this thread's two rows.
#[derive(Clone, Copy)]
pub struct Rows {
    /// The weight of a score in the tile is 2^(score + offset).
    offset: [f32; 2],
    /// Everything that was added has weights 2^(score + base). It is at most `offset`.
    pub base: [f32; 2],
    /// 2^(base - offset).
    factor: [f32; 2],
    /// The sum of the weights in this thread's own columns, of all tiles that were taken in.
    sum: [f32; 2],
    /// The same of the last tile.
    tile_sum: [f32; 2],
}

impl Rows {
    /// Rows that have seen nothing.
    #[inline(always)]
    pub fn new() -> Rows {
        Rows { offset: [0.0; 2], base: [0.0; 2], factor: [1.0; 2], sum: [0.0; 2], tile_sum: [0.0; 2] }
    }

    /// Makes the weights of a tile. While all rows of the warpgroup have the offset 0, `OFFSETS` is
    /// false.
    #[inline(always)]
    pub fn weigh<const OFFSETS: bool, P: ByteWeights>(&mut self, scores: &P::Scores) -> P::Weights {
        let mut sum = [0.0; 2];
        let weights = P::weigh(
            scores,
            #[inline(always)]
            |index, score| {
                let row = row_of(index);
                let weight = math::exp2(if OFFSETS { score + self.offset[row] } else { score });
                sum[row] += weight;
                weight
            },
        );
        self.tile_sum = sum;
        weights
    }

    /// Whether the weights of the tile are in range, in all rows of the warpgroup. `least` are the
    /// least sums of the rows.
    ///
    /// # Safety
    /// The whole warpgroup comes here. `warpgroup` is its number in the block.
    #[inline(always)]
    pub unsafe fn fits(&self, least: [f32; 2], warpgroup: u32) -> bool {
        let [a, b] = self.tile_sum;
        let (row_a, row_b) = (warp::sum::<4>(a), warp::sum::<4>(b));
        // What is not a number does not fit.
        let fits = (a <= MOST) & (b <= MOST) & (row_a >= least[0]) & (row_b >= least[1]);
        !thread::any_of_warpgroup(!fits, warpgroup)
    }

    /// Takes in the weights of the tile.
    #[inline(always)]
    pub fn take_in<const OFFSETS: bool>(&mut self) {
        self.sum = [0, 1].map(|row| {
            if OFFSETS {
                math::fma(self.tile_sum[row], self.factor[row], self.sum[row])
            } else {
                self.sum[row] + self.tile_sum[row]
            }
        });
    }

    /// Adds the products of a tile, which were weighted with its offsets, to the output.
    #[inline(always)]
    pub fn add<const OFFSETS: bool, F: Fragment>(&self, output: &mut F, products: &F) {
        output.for_each_with(
            products,
            #[inline(always)]
            |i, output, product| {
                *output = if OFFSETS { math::fma(product, self.factor[row_of(i)], *output) } else { *output + product };
            },
        );
    }

    /// Chooses the offsets for a tile by its largest scores.
    ///
    /// Multiply the output by the factors that this returns, one for each row.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn aim(&mut self, scores: &mut impl Fragment) -> [f32; 2] {
        let (max, total) = (max_of_rows(scores), self.total());
        let mut rescale = [1.0; 2];
        let mut row = 0;
        while row < 2 {
            // A row that sees nothing in the tile stays as it is.
            if max[row] != f32::NEG_INFINITY {
                self.offset[row] = HEADROOM - max[row];
                // A row that has seen nothing yet has nothing that another base would change.
                let is_first = total[row] == 0.0;
                let base = if is_first { self.offset[row] } else { self.base[row].min(self.offset[row]) };
                rescale[row] = if is_first { 1.0 } else { math::exp2(base - self.base[row]) };
                self.base[row] = base;
                self.factor[row] = math::exp2(base - self.offset[row]);
                self.sum[row] *= rescale[row];
            }
            row += 1;
        }
        rescale
    }

    /// The sums of all weights of the two rows.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn total(&self) -> [f32; 2] {
        [warp::sum::<4>(self.sum[0]), warp::sum::<4>(self.sum[1])]
    }
}
