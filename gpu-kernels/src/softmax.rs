//! Softmax over key tiles in powers of two, without a running maximum. Packed Q is scaled so that a
//! score is an exponent of two.
//!
//! Rows begin in one of two ways:
//!
//! * **Plain**: the weight of a score s is 2^s, and nothing but the exponential stands between the
//!   two. f32 and bf16 hold it for any score up to about a hundred on either side of 0. Rows begin
//!   so if the sums of a first tile's weights are in
//!   [`Dtype::tile_sums`](framestride_shapes::dtype::Dtype::tile_sums).
//! * **With offsets**: this is online softmax (Milakov and Gimelshein 2018; FlashAttention-2,
//!   section 3.1) with weights 2^(s + offset). Each row has an offset of its own. Accumulators of
//!   the scores start from the offsets, so that the tensor cores add them.
//!
//! Either way, weights may grow from tile to tile. Only when they grow too large is the maximum
//! looked for and the offset lowered. With scores that vary little from tile to tile, that never
//! happens. Otherwise threads exchange one bit for each tile: whether all is well.
//!
//! A thread of a warpgroup holds two query rows of a [`fragment`],
//! which the four lanes of a quad share.

pub mod e4m3;

use crate::cuda::mma::Fragment;
use crate::cuda::{math, thread, warp};
use crate::element::Element;
use framestride_shapes::fragment::{self, column_of, row_of};
use framestride_shapes::layout::Visible;

/// The offset of a row that has seen nothing. With any finite score the weight is then infinite,
/// and with a hidden one (-inf) it is exactly 0.
pub const NOTHING_SEEN: f32 = 1e30;

/// Offset and sum of this thread's two rows. The weight of a score is 2^(score + offset).
#[derive(Clone, Copy)]
pub struct Rows {
    /// The offsets. They are the same in all lanes of a quad, and 0 while rows are plain.
    pub offset: [f32; 2],
    /// The sum of the weights in this thread's own columns. [`Rows::total`] adds those of the quad.
    pub sum: [f32; 2],
    /// The part of `sum` that the last tile added.
    pub tile_sum: [f32; 2],
}

impl Rows {
    /// Rows that have seen nothing.
    #[inline(always)]
    pub fn new() -> Rows {
        Rows { offset: [NOTHING_SEEN; 2], sum: [0.0; 2], tile_sum: [0.0; 2] }
    }

    /// Turns a first tile of scores into plain weights and takes them in.
    ///
    /// The weights of some row of the warpgroup may be too large, or so small that the type might
    /// lose others beside them. Then it takes nothing in and gives false in all threads of the
    /// warpgroup. The scores are lost: compute them again for [`Rows::lower`].
    ///
    /// # Safety
    /// The whole warpgroup comes here. `warpgroup` is its number in the block.
    #[inline(always)]
    pub unsafe fn start_plain<E: Element>(&mut self, scores: &mut impl Fragment, warpgroup: u32) -> bool {
        let sum = weigh(scores);
        if thread::any_of_warpgroup(!may_start_plain::<E>(sum), warpgroup) {
            return false;
        }
        *self = Rows::plain(sum);
        true
    }

    /// Puts the rows' offsets where the products of queries and keys will be added to them. For
    /// plain rows (`OFFSETS` is false) it puts zeros.
    #[inline(always)]
    pub fn put_offsets<const OFFSETS: bool>(&self, scores: &mut impl Fragment) {
        scores.for_each(
            #[inline(always)]
            |i, score| *score = if OFFSETS { self.offset[row_of(i)] } else { 0.0 },
        );
    }

    /// Turns a tile of scores, which hold [the offsets](Rows::put_offsets), into weights and takes
    /// them in.
    ///
    /// If they are too large for some row of the warpgroup, nothing is taken in. Then it gives
    /// false in all threads of the warpgroup. The scores are lost: compute them again for
    /// [`Rows::lower`].
    ///
    /// # Safety
    /// As for [`Rows::start_plain`].
    #[inline(always)]
    pub unsafe fn absorb<E: Element>(&mut self, scores: &mut impl Fragment, warpgroup: u32) -> bool {
        let sum = weigh(scores);
        if thread::any_of_warpgroup(!fits::<E>(sum), warpgroup) {
            return false;
        }
        self.take(sum);
        true
    }

    /// Plain rows that have seen one tile, whose weights have these sums.
    #[inline(always)]
    pub fn plain(sum: [f32; 2]) -> Rows {
        Rows { offset: [0.0; 2], sum, tile_sum: sum }
    }

    /// Takes in a tile of weights, which have these sums.
    #[inline(always)]
    pub fn take(&mut self, sum: [f32; 2]) {
        self.tile_sum = sum;
        self.sum = [0, 1].map(|row| self.sum[row] + sum[row]);
    }

    /// Lowers the offsets of rows in which this tile has weights of more than
    /// 2^[`HEADROOM`](Element::HEADROOM), so that the largest weight is that.
    ///
    /// The scores do not hold the offsets. They are turned into weights, which are taken in.
    /// Multiply everything that was weighted before by the factors that this returns, one for each
    /// row.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn lower<E: Element>(&mut self, scores: &mut impl Fragment) -> [f32; 2] {
        let max = max_of_rows(scores);
        self.lower_to::<E>(scores, max)
    }

    /// The same where rows have other scores elsewhere: `max` are the largest of all.
    #[inline(always)]
    pub fn lower_to<E: Element>(&mut self, scores: &mut impl Fragment, max: [f32; 2]) -> [f32; 2] {
        let offset = [0, 1].map(|row| self.offset[row].min(E::HEADROOM - max[row]));
        let rescale = [0, 1].map(|row| math::exp2(offset[row] - self.offset[row]));
        self.offset = offset;
        add_to_rows(scores, offset);
        self.tile_sum = weigh(scores);
        self.sum = [0, 1].map(|row| math::fma(self.sum[row], rescale[row], self.tile_sum[row]));
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

/// Whether rows may be plain if the weights of their first tile have these sums.
#[inline(always)]
pub fn may_start_plain<E: Element>(sum: [f32; 2]) -> bool {
    let [least, most] = E::DTYPE.tile_sums();
    // What is not a number does not fit.
    let fits = |sum: f32| (sum >= least) & (sum <= most);
    fits(sum[0]) & fits(sum[1])
}

/// Whether the weights of a tile, which have these sums, are not too large.
#[inline(always)]
pub fn fits<E: Element>(sum: [f32; 2]) -> bool {
    let [_, most] = E::DTYPE.tile_sums();
    // What is not a number is too large as well.
    (sum[0] <= most) & (sum[1] <= most)
}

/// The largest scores of both rows.
///
/// # Safety
/// All lanes of the warp come here.
#[inline(always)]
pub unsafe fn max_of_rows(scores: &mut impl Fragment) -> [f32; 2] {
    let mut max = [f32::NEG_INFINITY; 2];
    scores.for_each(
        #[inline(always)]
        |i, score| {
            let row = &mut max[row_of(i)];
            *row = row.max(*score);
        },
    );
    [warp::max::<4>(max[0]), warp::max::<4>(max[1])]
}

/// Turns exponents of two into weights. Returns the sums of both rows.
#[inline(always)]
pub fn weigh(exponents: &mut impl Fragment) -> [f32; 2] {
    let mut sum = [0.0; 2];
    exponents.for_each(
        #[inline(always)]
        |i, weight| {
            *weight = math::exp2(*weight);
            sum[row_of(i)] += *weight;
        },
    );
    sum
}

/// Adds to each row of a fragment.
#[inline(always)]
pub fn add_to_rows(fragment: &mut impl Fragment, summands: [f32; 2]) {
    fragment.for_each(
        #[inline(always)]
        |i, value| *value += summands[row_of(i)],
    );
}

/// Multiplies each row of a fragment by its factor.
#[inline(always)]
pub fn scale_rows(fragment: &mut impl Fragment, factors: [f32; 2]) {
    fragment.for_each(
        #[inline(always)]
        |i, value| *value *= factors[row_of(i)],
    );
}

/// Which keys of a tile the thread's rows see ([`fragment::seen_keys`]). The tile has `tile_rows`
/// keys from packed row `first` on, and `rows` is what the thread's rows see.
#[inline(always)]
pub fn seen_keys(first: u32, tile_rows: u32, lane: u32, rows: [Visible; 2]) -> [u64; 2] {
    rows.map(
        #[inline(always)]
        |row| fragment::seen_keys(row, first, tile_rows, lane),
    )
}

/// Replaces the values that belong to keys which are not seen.
#[inline(always)]
pub fn replace_unseen(fragment: &mut impl Fragment, seen: [u64; 2], replacement: f32) {
    // These are words, since one instruction (R2P) makes predicates of seven bits of a word.
    let seen = seen.map(|bits| [bits as u32, (bits >> 32) as u32]);
    fragment.for_each(
        #[inline(always)]
        |i, value| {
            let key = column_of(i);
            if seen[row_of(i)][(key / 32) as usize] & (1 << (key % 32)) == 0 {
                *value = replacement;
            }
        },
    );
}
