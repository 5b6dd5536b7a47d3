//! Online softmax over key tiles (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1), in powers of two.
//!
//! A thread of a warpgroup holds two query rows of an m64 fragment ([`crate::cuda::mma`]); the four lanes of a quad share them.

use crate::cuda::mma::Fragment;
use crate::cuda::{math, warp};
use framestride_shapes::layout::Visible;

/// Below every score a model makes, and finite: a row that has seen nothing yet weighs masked scores (-inf) as exactly 0.
const LOWEST: f32 = -1e30;

/// Running maximum and sum of this thread's two rows.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Largest raw score so far, the same in all lanes of the quad.
    pub max: [f32; 2],
    /// Sum of the weights in this thread's own columns; [`Rows::total`] adds the quad's.
    pub sum: [f32; 2],
}

impl Rows {
    /// Nothing seen.
    #[inline(always)]
    pub fn new() -> Rows {
        Rows { max: [LOWEST; 2], sum: [0.0; 2] }
    }

    /// Takes in a tile of raw scores, turning them into weights 2^(scale (score - max)). Returns the factors by which everything
    /// weighted so far must be multiplied.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn absorb(&mut self, scores: &mut impl Fragment, scale_log2: f32) -> [f32; 2] {
        let mut max = self.max;
        scores.for_each(
            #[inline(always)]
            |i, score| {
                let row = &mut max[row_of(i)];
                *row = row.max(*score);
            },
        );
        let max = [warp::max::<4>(max[0]), warp::max::<4>(max[1])];
        let rescale = [0, 1].map(|row| math::exp2((self.max[row] - max[row]) * scale_log2));
        let shift = [-max[0] * scale_log2, -max[1] * scale_log2];
        let mut sum = [self.sum[0] * rescale[0], self.sum[1] * rescale[1]];
        scores.for_each(
            #[inline(always)]
            |i, score| {
                let row = row_of(i);
                *score = math::exp2(math::fma(*score, scale_log2, shift[row]));
                sum[row] += *score;
            },
        );
        *self = Rows { max, sum };
        rescale
    }

    /// Sums of all weights of the two rows.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn total(&self) -> [f32; 2] {
        [warp::sum::<4>(self.sum[0]), warp::sum::<4>(self.sum[1])]
    }
}

/// Which of the thread's two rows value `index` of a fragment belongs to.
#[inline(always)]
pub fn row_of(index: u32) -> usize {
    (index / 2 % 2) as usize
}

/// Multiplies each row of a fragment by its factor.
#[inline(always)]
pub fn scale_rows(fragment: &mut impl Fragment, factors: [f32; 2]) {
    fragment.for_each(
        #[inline(always)]
        |i, value| *value *= factors[row_of(i)],
    );
}

/// Sets the scores of unseen keys to -inf: `first` is the packed row of the tile's first key, `rows` what the thread's rows see.
#[inline(always)]
pub fn hide_unseen(scores: &mut impl Fragment, first: u32, lane: u32, rows: [Visible; 2]) {
    // Bounds relative to this thread's first column, so that every element compares a constant with them.
    let first = (first + 2 * (lane % 4)) as i32;
    let relative = |bound: fn(&Visible) -> u32| [bound(&rows[0]) as i32 - first, bound(&rows[1]) as i32 - first];
    let (prefix, start, end) = (relative(|row| row.prefix), relative(|row| row.start), relative(|row| row.end));
    scores.for_each(
        #[inline(always)]
        |i, score| {
            let (row, column) = (row_of(i), (i / 4 * 8 + i % 2) as i32);
            if !(column < prefix[row] || (column >= start[row] && column < end[row])) {
                *score = f32::NEG_INFINITY;
            }
        },
    );
}
