//! What keeps the accumulators of O small.
//!
//! Tensor cores cut what they add, towards zero, some bits below the accumulator. The larger it is,
//! the more of every product is lost, and where V has a mean, all losses have one sign. After
//! 119056 keys the output would be too small by 8e-4 of itself.
//!
//! So an accumulator is moved near zero now and then. What is taken from it is its **anchor**,
//! times a sum of weights:
//!
//! ```text
//! sum of w v = accumulator + anchor x (the thread's part of the sum of w when the anchor was put)
//! ```
//!
//! The anchor is about the output so far, in bf16. To have room in shared memory, the thread's two
//! rows share those of each column: the one that lies nearer to zero, or zero where the two have
//! different signs. So no accumulator becomes larger than it was, but for what rounding adds.
//!
//! Any sum would do, since the same is given back. That of the whole row would take shuffles, and
//! in a loop with shuffles ptxas no longer sees that all lanes go the same way.

use crate::cuda::mma::Fragment;
use crate::cuda::{math, shared, thread};
use crate::element::{Bf16, Element};
use crate::model::Hopper;
use crate::softmax::Rows;
use framestride_shapes::blocks::{ANCHOR_TILES, WARPGROUP};
use framestride_shapes::image::CHUNK_BYTES;

/// Columns whose anchors lie in a chunk of a thread: it has two of 8.
const COLUMNS: u32 = 32;

/// The largest finite bf16, twice.
const LARGEST: u32 = 0x7f7f_7f7f;

/// The signs of two bf16.
const SIGNS: u32 = 0x8000_8000;

/// Before the first key tile: nothing has been taken.
///
/// # Safety
/// A consumer thread of **attention** comes here, as to all functions of this module.
#[inline(always)]
pub unsafe fn clear<M: Hopper>() {
    let mut chunk = 0;
    while chunk < M::HEAD_DIM / COLUMNS {
        shared::store16(place::<M>(chunk), [0; 4]);
        chunk += 1;
    }
    store_sums::<M>([0.0; 2]);
}

/// Multiplies what was taken from the rows by their factors.
///
/// # Safety
/// As for [`clear`].
#[inline(always)]
pub unsafe fn scale<M: Hopper>(factors: [f32; 2]) {
    let sums = load_sums::<M>();
    store_sums::<M>([sums[0] * factors[0], sums[1] * factors[1]]);
}

/// Puts anchors where the output is.
///
/// # Safety
/// As for [`clear`], while no product is on its way to `output`.
#[inline(always)]
pub unsafe fn put<M: Hopper>(output: &mut impl Fragment, rows: &Rows) {
    let (old, sums) = (load_sums::<M>(), rows.sum);
    let inverse = sums.map(math::reciprocal).map(|inverse| Bf16::pack(inverse, inverse));
    each_group::<M, true>(
        output,
        #[inline(always)]
        |[a, b, c, d], anchors| {
            add([a, b, c, d], *anchors, old);
            *anchors = nearer(
                math::mul_bf16x2(Bf16::pack(*a, *b), inverse[0]),
                math::mul_bf16x2(Bf16::pack(*c, *d), inverse[1]),
            );
            add([a, b, c, d], *anchors, [-sums[0], -sums[1]]);
        },
    );
    store_sums::<M>(sums);
}

/// Gives back what was taken, after all key tiles.
///
/// # Safety
/// As for [`put`].
#[inline(always)]
pub unsafe fn give_back<M: Hopper>(output: &mut impl Fragment, tiles: u32) {
    if tiles <= ANCHOR_TILES {
        return;
    }
    let sums = load_sums::<M>();
    each_group::<M, false>(
        output,
        #[inline(always)]
        |values, anchors| add(values, *anchors, sums),
    );
}

/// Whether anchors are due before the products of key tile `tile`.
#[inline(always)]
pub fn are_due(tile: u32) -> bool {
    tile.is_multiple_of(ANCHOR_TILES)
}

/// Calls `f` for the four values of each group of 8 columns and the anchors of its two columns. With
/// `STORE`, what `f` makes of the anchors is kept.
#[inline(always)]
unsafe fn each_group<M: Hopper, const STORE: bool>(
    output: &mut impl Fragment,
    mut f: impl FnMut([&mut f32; 4], &mut u32),
) {
    let mut anchors = [0; 4];
    output.for_each_group(
        #[inline(always)]
        |group, values| {
            let slot = (group % 4) as usize;
            if slot == 0 {
                anchors = shared::load16(place::<M>(group / 4));
            }
            f(values, &mut anchors[slot]);
            if STORE && slot == 3 {
                shared::store16(place::<M>(group / 4), anchors);
            }
        },
    );
}

/// The place of this thread's anchors in four groups of 8 columns.
#[inline(always)]
fn place<M: Hopper>(groups: u32) -> u32 {
    shared::address(M::ATTENTION_SHARED.anchors, groups) + (thread::index() - WARPGROUP) * CHUNK_BYTES
}

/// The place of the sum of weights with which the anchors of a row were put.
#[inline(always)]
fn place_of_sum<M: Hopper>(row: u32) -> u32 {
    shared::address(M::ATTENTION_SHARED.anchor_sums, row) + (thread::index() - WARPGROUP) * 4
}

#[inline(always)]
unsafe fn load_sums<M: Hopper>() -> [f32; 2] {
    [shared::load_f32(place_of_sum::<M>(0)), shared::load_f32(place_of_sum::<M>(1))]
}

#[inline(always)]
unsafe fn store_sums<M: Hopper>(sums: [f32; 2]) {
    shared::store_f32(place_of_sum::<M>(0), sums[0]);
    shared::store_f32(place_of_sum::<M>(1), sums[1]);
}

/// Adds the anchors of two columns, times a factor of each row, to the four values of a group.
#[inline(always)]
fn add([a, b, c, d]: [&mut f32; 4], anchors: u32, factors: [f32; 2]) {
    // The second is not cut to bf16 again, since any number will do that is given back.
    let [x, y] = [anchors << 16, anchors].map(f32::from_bits);
    *a = math::fma(x, factors[0], *a);
    *b = math::fma(y, factors[0], *b);
    *c = math::fma(x, factors[1], *c);
    *d = math::fma(y, factors[1], *d);
}

/// Of each of two bf16 the one nearer to zero, or zero where the two have different signs. The
/// result is finite, so that a sum of no weights takes nothing.
#[inline(always)]
fn nearer(x: u32, y: u32) -> u32 {
    let (less, more) = (math::min_bf16x2(x, y), math::max_bf16x2(x, y));
    let nearer = math::max_bf16x2(less, math::min_bf16x2(more, 0));
    math::max_bf16x2(math::min_bf16x2(nearer, LARGEST), LARGEST | SIGNS)
}
