//! Softmax over key tiles in powers of two, without a running maximum. Packed Q is scaled so that a score is an exponent of two.
//!
//! * **Plain**: the weight of a score s is 2^s, and between the two stands nothing but the exponential. f32 and bf16 hold it for any score
//!   up to about a hundred on either side of 0. Rows begin so if the sums of their weights of a first tile are in
//!   [`Dtype::tile_sums`](framestride_shapes::dtype::Dtype::tile_sums).
//! * **With offsets**: online softmax (Milakov and Gimelshein 2018; FlashAttention-2, section 3.1) with weights 2^(s + offset) relative to
//!   an offset of the row. Accumulators of the scores start from the offsets, so that the tensor cores add them.
//!
//! In both, weights may grow from tile to tile. Only when they grow too large is the maximum looked for and the offset lowered; with
//! scores that vary little from tile to tile that is never. Otherwise threads exchange one bit a tile: whether all is well.
//!
//! A thread of a warpgroup holds two query rows of an m64 fragment ([`crate::cuda::mma`]); the four lanes of a quad share them.

use crate::cuda::mma::Fragment;
use crate::cuda::{math, thread, warp};
use crate::element::Element;
use framestride_shapes::fragment::{self, column_of, row_of};
use framestride_shapes::layout::Visible;

/// The offset of a row that has seen nothing: with any finite score the weight is infinite, with a hidden one (-inf) exactly 0.
const NOTHING_SEEN: f32 = 1e30;

/// Running offset and sum of this thread's two rows: the weight of a score is 2^(score + offset).
#[derive(Clone, Copy)]
pub struct Rows {
    /// The same in all lanes of the quad; 0 while rows are plain.
    pub offset: [f32; 2],
    /// Sum of the weights in this thread's own columns; [`Rows::total`] adds the quad's.
    pub sum: [f32; 2],
    /// Of that, the last tile's.
    pub tile_sum: [f32; 2],
}

impl Rows {
    /// Nothing seen.
    #[inline(always)]
    pub fn new() -> Rows {
        Rows { offset: [NOTHING_SEEN; 2], sum: [0.0; 2], tile_sum: [0.0; 2] }
    }

    /// Turns a first tile of scores into plain weights and takes them in, unless for some row of the warpgroup these are too large, or so
    /// small that the type might lose others beside them: then it gives false, in all threads of the warpgroup, and nothing is taken in. The
    /// scores are lost: compute them again for [`Rows::lower`].
    ///
    /// # Safety
    /// The whole warpgroup comes here; `warpgroup` is its number in the block.
    #[inline(always)]
    pub unsafe fn start_plain<E: Element>(&mut self, scores: &mut impl Fragment, warpgroup: u32) -> bool {
        let [least, most] = E::DTYPE.tile_sums();
        let sum = weigh(scores);
        // Not a number does not fit.
        let fits = |sum: f32| (sum >= least) & (sum <= most);
        if thread::any_of_warpgroup(!(fits(sum[0]) & fits(sum[1])), warpgroup) {
            return false;
        }
        *self = Rows { offset: [0.0; 2], sum, tile_sum: sum };
        true
    }

    /// Puts the rows' offsets, or zeros for plain rows, where the products of queries and keys are added to them.
    #[inline(always)]
    pub fn put_offsets<const OFFSETS: bool>(&self, scores: &mut impl Fragment) {
        scores.for_each(
            #[inline(always)]
            |i, score| *score = if OFFSETS { self.offset[row_of(i)] } else { 0.0 },
        );
    }

    /// Turns a tile of scores, which hold [the offsets](Rows::put_offsets), into weights and takes them in, unless they are too large for
    /// some row of the warpgroup: then it gives false, in all threads of the warpgroup, and nothing is taken in. The scores are lost: compute
    /// them again for [`Rows::lower`].
    ///
    /// # Safety
    /// As for [`Rows::start_plain`].
    #[inline(always)]
    pub unsafe fn absorb<E: Element>(&mut self, scores: &mut impl Fragment, warpgroup: u32) -> bool {
        let [_, most] = E::DTYPE.tile_sums();
        let sum = weigh(scores);
        // Not a number is too large as well.
        if thread::any_of_warpgroup(!(sum[0] <= most) | !(sum[1] <= most), warpgroup) {
            return false;
        }
        self.tile_sum = sum;
        self.sum = [0, 1].map(|row| self.sum[row] + sum[row]);
        true
    }

    /// Lowers the offsets of rows where this tile of scores has weights of more than 2^[`HEADROOM`](Element::HEADROOM), so that the largest is
    /// that. Turns the scores, which do not hold the offsets, into weights and takes them in. Returns the factors by which everything
    /// weighted before must be multiplied.
    ///
    /// # Safety
    /// All lanes of the warp come here.
    #[inline(always)]
    pub unsafe fn lower<E: Element>(&mut self, scores: &mut impl Fragment) -> [f32; 2] {
        let mut max = [f32::NEG_INFINITY; 2];
        scores.for_each(
            #[inline(always)]
            |i, score| {
                let row = &mut max[row_of(i)];
                *row = row.max(*score);
            },
        );
        let max = [warp::max::<4>(max[0]), warp::max::<4>(max[1])];
        let offset = [0, 1].map(|row| self.offset[row].min(E::HEADROOM - max[row]));
        let rescale = [0, 1].map(|row| math::exp2(offset[row] - self.offset[row]));
        self.offset = offset;
        scores.for_each(
            #[inline(always)]
            |i, score| *score += offset[row_of(i)],
        );
        self.tile_sum = weigh(scores);
        self.sum = [0, 1].map(|row| math::fma(self.sum[row], rescale[row], self.tile_sum[row]));
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

/// Turns exponents of two into weights; the sums of both rows.
#[inline(always)]
fn weigh(exponents: &mut impl Fragment) -> [f32; 2] {
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

/// Multiplies each row of a fragment by its factor.
#[inline(always)]
pub fn scale_rows(fragment: &mut impl Fragment, factors: [f32; 2]) {
    fragment.for_each(
        #[inline(always)]
        |i, value| *value *= factors[row_of(i)],
    );
}

/// Which keys of a tile the thread's rows see ([`fragment::seen_keys`]): `first` is the packed row of the first of the tile's
/// `tile_rows` keys, `rows` what the thread's rows see.
#[inline(always)]
pub fn seen_keys(first: u32, tile_rows: u32, lane: u32, rows: [Visible; 2]) -> [u64; 2] {
    rows.map(
        #[inline(always)]
        |row| fragment::seen_keys(row, first, tile_rows, lane),
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
            let key = column_of(i);
            if seen[row_of(i)][(key / 32) as usize] & 1 << key % 32 == 0 {
                *value = replacement;
            }
        },
    );
}
