//! Softmax over key tiles in powers of two, without a running maximum. Packed Q is scaled so that a score is an exponent of two.
//!
//! * **Bounded** scores, where no |q| |k| of a head is more than
//!   [`SCORE_BOUND`](Element::SCORE_BOUND) (Cauchy and Schwarz; a QK-norm sees to it): the weight of a
//!   score s is 2^s, which the element type and f32 sums can hold. Between a score and its weight stands nothing but the exponential.
//! * **Any** scores: online softmax (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1) with weights 2^(s + offset) relative to
//!   an offset of the row, which may grow beyond 1. Only when they grow too large is the maximum looked for and the offset lowered; with
//!   scores that vary little from tile to tile that is the first tile alone. Lanes exchange nothing otherwise.
//!
//! A thread of a warpgroup holds two query rows of an m64 fragment ([`crate::cuda::mma`]); the four lanes of a quad share them.

use crate::cuda::mma::Fragment;
use crate::cuda::{global, math, thread, warp};
use crate::element::Element;
use framestride_shapes::layout::Visible;

/// Whether a head's scores are bounded, by the largest squared norms of packed rows.
///
/// # Safety
/// `norms` as [`PackParams::norms`](framestride_shapes::launch::PackParams::norms) says, for more than `head` heads.
#[inline(always)]
pub unsafe fn are_bounded<E: Element>(norms: u64, head: u32) -> bool {
    let [query, key] = global::load_f32x2(norms + head as u64 * 8);
    // NaN is not bounded.
    query * key <= E::SCORE_BOUND * E::SCORE_BOUND
}

/// The offset of a row that has seen nothing: with any finite score the weight is infinite, with a hidden one (-inf) exactly 0.
const NOTHING_SEEN: f32 = 1e30;

/// Largest sum of one thread's weights of a tile: no weight is more, which f16 can hold.
const MOST: f32 = 32768.0;

/// Running offset and sum of this thread's two rows: the weight of a score is 2^(score + offset).
#[derive(Clone, Copy)]
pub struct Rows {
    /// The same in all lanes of the quad.
    pub offset: [f32; 2],
    /// Sum of the weights in this thread's own columns; [`Rows::total`] adds the quad's.
    pub sum: [f32; 2],
    /// Of that, the last tile's.
    pub tile_sum: [f32; 2],
}

impl Rows {
    /// Nothing seen of any scores.
    #[inline(always)]
    pub fn new() -> Rows {
        Rows { offset: [NOTHING_SEEN; 2], sum: [0.0; 2], tile_sum: [0.0; 2] }
    }

    /// Nothing seen of bounded scores.
    #[inline(always)]
    pub fn bounded() -> Rows {
        Rows { offset: [0.0; 2], ..Rows::new() }
    }

    /// Turns a tile of bounded scores into weights and takes them in.
    #[inline(always)]
    pub fn take_bounded(&mut self, scores: &mut impl Fragment) {
        self.tile_sum = weigh(
            scores,
            #[inline(always)]
            |score, _| score,
        );
        self.sum = [0, 1].map(|row| self.sum[row] + self.tile_sum[row]);
    }

    /// `parity`, which ptxas can only know when all weights are summed: a sum is never negative, but it cannot know that. So it leaves the
    /// softmax before the wait for that parity, and does not sink it below the wait for products that should run meanwhile.
    #[inline(always)]
    pub fn after(&self, parity: u32) -> u32 {
        parity ^ (self.sum[0] + self.sum[1] < 0.0) as u32
    }

    /// Turns a tile of any scores into weights and takes them in, unless some row of the warpgroup has weights too large for its
    /// offset: then it gives false, in all threads of the warpgroup, and nothing is taken in. The scores are lost: compute them again
    /// for [`Rows::lower`].
    ///
    /// # Safety
    /// The whole warpgroup comes here; `warpgroup` is its number in the block.
    #[inline(always)]
    pub unsafe fn absorb(&mut self, scores: &mut impl Fragment, warpgroup: u32) -> bool {
        let sum = self.weigh_with_offset(scores);
        // Not a number is too large as well.
        if thread::any_of_warpgroup(!(sum[0] <= MOST) | !(sum[1] <= MOST), warpgroup) {
            return false;
        }
        self.tile_sum = sum;
        self.sum = [0, 1].map(|row| self.sum[row] + sum[row]);
        true
    }

    /// Lowers the offsets so that the largest of all weights, those of this tile of scores included, is at most 2^headroom. Turns
    /// the scores into weights and takes them in. Returns the factors by which everything weighted before must be multiplied.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn lower(&mut self, scores: &mut impl Fragment, headroom: f32) -> [f32; 2] {
        let mut max = [f32::NEG_INFINITY; 2];
        scores.for_each(
            #[inline(always)]
            |i, score| {
                let row = &mut max[row_of(i)];
                *row = row.max(*score);
            },
        );
        let max = [warp::max::<4>(max[0]), warp::max::<4>(max[1])];
        let offset = [0, 1].map(|row| self.offset[row].min(headroom - max[row]));
        let rescale = [0, 1].map(|row| math::exp2(offset[row] - self.offset[row]));
        self.offset = offset;
        self.tile_sum = self.weigh_with_offset(scores);
        self.sum = [0, 1].map(|row| math::fma(self.sum[row], rescale[row], self.tile_sum[row]));
        rescale
    }

    #[inline(always)]
    fn weigh_with_offset(&self, scores: &mut impl Fragment) -> [f32; 2] {
        weigh(
            scores,
            #[inline(always)]
            |score, row| score + self.offset[row],
        )
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

/// Turns scores into weights, two to the power of `exponent(score, row)`; the sums of both rows.
#[inline(always)]
fn weigh(scores: &mut impl Fragment, exponent: impl Fn(f32, usize) -> f32) -> [f32; 2] {
    let mut sum = [0.0; 2];
    scores.for_each(
        #[inline(always)]
        |i, score| {
            let row = row_of(i);
            *score = math::exp2(exponent(*score, row));
            sum[row] += *score;
        },
    );
    sum
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

/// Which keys of a tile the thread's rows see, a bit each as [`Visible::fragment_keys`] says: `first` is the packed row of the first
/// of the tile's `tile_rows` keys, `rows` what the thread's rows see.
#[inline(always)]
pub fn seen_keys(first: u32, tile_rows: u32, lane: u32, rows: [Visible; 2]) -> [u64; 2] {
    rows.map(
        #[inline(always)]
        |row| row.fragment_keys(first + 2 * (lane % 4), tile_rows),
    )
}

/// Replaces what belongs to unseen keys.
#[inline(always)]
pub fn replace_unseen(fragment: &mut impl Fragment, seen: [u64; 2], replacement: f32) {
    // Words, since one instruction (R2P) makes predicates of seven of their bits.
    let seen = seen.map(|bits| [bits as u32, (bits >> 32) as u32]);
    fragment.for_each(
        #[inline(always)]
        |i, value| {
            let key = i / 4 * 2 + i % 2;
            if seen[row_of(i)][(key / 32) as usize] & 1 << key % 32 == 0 {
                *value = replacement;
            }
        },
    );
}
