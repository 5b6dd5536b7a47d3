//! Attention in 8 bits. Its rounds are those of 16 bits but for two things: the products of each
//! tile with V have an accumulator of their own, and the weights of a tile have offsets of their own
//! ([`softmax::e4m3`](crate::softmax::e4m3)).
//!
//! An accumulator of 8-bit products loses what is below 2^-13 of its largest term. Over a long
//! sequence it would stop growing. So the products of a tile begin at zero, and are added to the
//! output in f32.

use super::{Consumer, key_image};
use crate::attention::store::{Sums, store};
use crate::attention::work::Work;
use crate::cuda::barrier::{Barrier, Slot};
use crate::cuda::mma::{Descriptor, Fragment, Products, TileProducts};
use crate::cuda::{global, math, shared, warp};
use crate::masks::Mask;
use crate::masks::band::Band;
use crate::model::HopperE4m3;
use crate::softmax::e4m3::{LEAST_MEAN, Rows};
use crate::softmax::{replace_unseen, scale_rows};
use framestride_shapes::fragment::{self, first_column};
use framestride_shapes::image::e4m3::{CENTER_FACTOR, CENTER_FLOATS, CENTER_LOST, LOST_SCALE};
use framestride_shapes::params::AttentionParams;

/// Takes a query tile through its key tiles. `warp_row` is the packed row of the warp's first query.
#[inline(always)]
pub unsafe fn attend<M: HopperE4m3>(params: &AttentionParams, consumer: &mut Consumer, work: &Work<M>, warp_row: u32) {
    let lane = consumer.lane;
    let mask = work.mask.uniform();
    let thread_rows = fragment::thread_rows(warp_row, lane);
    let mut rows = Rows::new();
    let mut output = <M::Attention as Products>::Output::splat(0.0);
    if mask.tiles() > 0 {
        let (warp_sees, thread_sees) = (mask.warp(warp_row, 16), mask.thread(thread_rows));
        consumer.sweep_e4m3::<M>(&View { mask, warp_sees, thread_sees, lane }, &mut rows, &mut output);
    } else {
        Barrier::at(M::ATTENTION_SHARED.query_free, consumer.warpgroup).release(lane);
    }
    // V was packed without its mean, and multiplied by a power of two. Of the mean that was left,
    // rounding took a part.
    let center = params.centers + (work.head * CENTER_FLOATS) as u64 * 4;
    let inverse = global::load_f32(center + (CENTER_FACTOR as u64 + 1) * 4);
    let live = (work.valid.sum() + M::layout().video_tokens()) as f32;
    let share = inverse * (1.0 / LOST_SCALE) * math::reciprocal(live);
    let mean = center + first_column(math::opaque(lane)) as u64 * 4;
    let finish = |group: u32, [x, y]: [f32; 2]| {
        let [a, b] = global::load_f32x2(mean + group as u64 * 32);
        let lost =
            global::load_f32x2(mean + (CENTER_LOST * 4 + group * 32) as u64).map(|lost| lost.to_bits() as i32 as f32);
        [math::fma(lost[0], share, math::fma(x, inverse, a)), math::fma(lost[1], share, math::fma(y, inverse, b))]
    };
    let sums = Sums { offset: rows.base, total: rows.total() };
    store::<M>(params, work, &mut output, sums, thread_rows, lane, finish);
}

/// What the rows of a warp see.
struct View<M: HopperE4m3> {
    mask: Band<M>,
    warp_sees: <Band<M> as Mask>::Warp,
    thread_sees: <Band<M> as Mask>::Thread,
    lane: u32,
}

/// What they see of one tile.
#[derive(Clone, Copy)]
struct TileView {
    first: u32,
    sees_all: bool,
}

impl<M: HopperE4m3> View<M> {
    fn tiles(&self) -> u32 {
        self.mask.tiles()
    }

    #[inline(always)]
    fn tile(&self, tile: u32) -> TileView {
        let first = self.mask.first_key(tile);
        TileView { first, sees_all: Band::<M>::sees_all(&self.warp_sees, first) }
    }

    /// Sets the scores of unseen keys of a tile to -inf. Returns the least sums of the weights.
    #[inline(always)]
    unsafe fn hide(&self, tile: TileView, scores: &mut <M::Attention as Products>::Scores) -> [f32; 2] {
        if tile.sees_all {
            return [M::TILES.key_rows as f32 * LEAST_MEAN; 2];
        }
        let seen = Band::<M>::seen_keys(&self.thread_sees, tile.first, self.lane);
        replace_unseen(scores, seen, f32::NEG_INFINITY);
        let least = |seen: u64| warp::sum::<4>(seen.count_ones() as f32 * LEAST_MEAN);
        [least(seen[0]), least(seen[1])]
    }
}

impl Consumer {
    /// Goes over the key tiles of a query tile, from the one in `slot` to the last. It takes all
    /// weights into `rows`, and their products with V into `output`.
    #[inline(always)]
    unsafe fn sweep_e4m3<M: HopperE4m3>(
        &mut self,
        view: &View<M>,
        rows: &mut Rows,
        output: &mut <M::Attention as Products>::Output,
    ) {
        let mut tile = 0;
        let mut scores = self.first_scores::<M>();
        let least = view.hide(view.tile(tile), &mut scores);
        if self.rounds_e4m3::<M, false>(&mut tile, view, &mut scores, least, rows, output) {
            return;
        }
        loop {
            scores = self.first_scores::<M>();
            let least = view.hide(view.tile(tile), &mut scores);
            scale_rows(output, rows.aim(&mut scores));
            if self.rounds_e4m3::<M, true>(&mut tile, view, &mut scores, least, rows, output) {
                return;
            }
        }
    }

    /// The rounds of [`Consumer::sweep_e4m3`], from the scores of `tile` on, with the rows' offsets
    /// or (`OFFSETS` is false) with none. With offsets, those of `tile` are its own, and it fits.
    ///
    /// Whether the weights of a tile fit is asked while its products are on their way, since these
    /// need not be added. False means that they do not fit. `tile` and `slot` are at that one then,
    /// and nothing of it was taken in.
    #[inline(always)]
    unsafe fn rounds_e4m3<M: HopperE4m3, const OFFSETS: bool>(
        &mut self,
        tile: &mut u32,
        view: &View<M>,
        scores: &mut <M::Attention as Products>::Scores,
        mut least: [f32; 2],
        rows: &mut Rows,
        output: &mut <M::Attention as Products>::Output,
    ) -> bool {
        let memory = M::ATTENTION_SHARED;
        let mut weights = rows.weigh::<OFFSETS, M::Attention>(scores);
        let mut is_aimed = OFFSETS;
        loop {
            let (here, next) = (self.slot, self.slot.next(M::TILES.stages));
            let mut products = <M::Attention as Products>::Output::splat(0.0);
            Barrier::at(memory.value_full, here.stage).wait(here.parity);
            if *tile + 1 == view.tiles() {
                M::Attention::start_output(&mut products, &weights, value_image::<M>(here));
                let fits = rows.fits(least, self.warpgroup) | is_aimed;
                M::Attention::wait_output(&mut products, &mut weights);
                if !fits {
                    return false;
                }
                self.slot = next;
                Barrier::at(memory.query_free, self.warpgroup).release(self.lane);
                Barrier::at(memory.key_free, here.stage).release(self.lane);
                Barrier::at(memory.value_free, here.stage).release(self.lane);
                rows.take_in::<OFFSETS>();
                rows.add::<OFFSETS, _>(output, &products);
                return true;
            }
            Barrier::at(memory.key_full, next.stage).wait(next.parity);
            *scores = <M::Attention as Products>::Scores::splat(0.0);
            M::Attention::start_scores(scores, self.query, key_image::<M>(next));
            M::Attention::start_output(&mut products, &weights, value_image::<M>(here));
            let fits = rows.fits(least, self.warpgroup) | is_aimed;
            let next_view = view.tile(*tile + 1);
            M::Attention::wait_scores::<1>(scores);
            if !fits {
                M::Attention::wait_output(&mut products, &mut weights);
                return false;
            }
            rows.take_in::<OFFSETS>();
            Barrier::at(memory.key_free, here.stage).release(self.lane);
            least = view.hide(next_view, scores);
            M::Attention::wait_output(&mut products, &mut weights);
            Barrier::at(memory.value_free, here.stage).release(self.lane);
            // Sums hide in the shadow of exponentials.
            weights = rows.weigh::<OFFSETS, M::Attention>(scores);
            rows.add::<OFFSETS, _>(output, &products);
            is_aimed = false;
            self.slot = next;
            *tile += 1;
        }
    }
}

/// The value tile in a slot.
#[inline(always)]
fn value_image<M: HopperE4m3>(slot: Slot) -> Descriptor {
    Descriptor::values_e4m3(shared::address(M::ATTENTION_SHARED.value, slot.stage))
}
