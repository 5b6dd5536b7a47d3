//! The consumers of **profile**. They go over the block's tiles for all masks at once, and again
//! for each single mask that needs it.

use core::ops::Range;

use super::results::{Results, Store};
use super::samples;
use super::{COLUMNS, CONSUMERS, DENSE, KEY_ROWS, MASKS, Map, lost_masks, next_sweep, number};
use crate::cuda::barrier::{Barrier, Slot};
use crate::cuda::mma::{Fragment, Products, TileProducts};
use crate::cuda::{shared, thread, warp};
use crate::masks::{CANDIDATES, each_candidate};
use crate::model::Hopper;
use framestride_shapes::fragment;
use framestride_shapes::params::ProfileParams;

/// A consumer warpgroup has all samples of the block, and its own columns or its own tiles.
/// `consumer_warp` counts over the warps of both.
#[inline(always)]
pub unsafe fn consume<M: Hopper>(
    params: &ProfileParams,
    consumer_warp: u32,
    [split, group, head]: [u32; 3],
    valid_text: u32,
    tiles: Range<u32>,
) {
    let lane = thread::lane();
    let warpgroup = consumer_warp / 4;
    let columns = if Map::<M>::TURNS { 0 } else { warpgroup };
    let samples = fragment::thread_rows(consumer_warp % 4 * 16, lane);
    let end = valid_text + M::layout().video_tokens();
    let consumer = Consumer { lane, warpgroup, columns, samples, end };
    let plan = M::partials(params.splits);
    let partial = params.partials + plan.offset(head, group, split) * 4;
    let place = |mask: u32| partial + plan.mask_offset(mask) as u64 * 4;
    // With turns the first warpgroup has the results of both.
    let has_results = !Map::<M>::TURNS || warpgroup == 0;

    let mut results = consumer.sweep::<M, false>(DENSE, &tiles, 0);
    if has_results {
        let Results { rows, all, sums, masked } = &mut results;
        // The lanes of a quad hold the sums of their own columns of the tiles.
        let sums = sums.map(|rows| rows.map(|sum| warp::sum::<4>(sum)));
        if lane % 4 == 0 && columns == 0 {
            let mut row = 0;
            while row < 2 {
                each_candidate(
                    #[inline(always)]
                    |mask| shared::store_f32(Map::<M>::masked_sum(mask as u32, samples[row]), sums[mask][row]),
                );
                row += 1;
            }
        }
        Barrier::at(M::PROFILE_SHARED.swept, 0).arrive();
        // Meanwhile the producers judge the sums.
        let store = Store { samples, offset: rows.offset, lane, first_column: columns * COLUMNS };
        store.mask::<M>(place(DENSE), rows.total(), all);
        each_candidate(
            #[inline(always)]
            |mask| store.mask::<M>(place(number(mask)), sums[mask], &mut masked[mask]),
        );
    }
    let lost = lost_masks::<M>();

    let mut tiles_before = 0;
    let mut mask = next_sweep(DENSE, lost);
    while mask != MASKS {
        tiles_before += tiles.end - tiles.start;
        let mut results = consumer.sweep::<M, true>(mask, &tiles, tiles_before);
        if has_results {
            Barrier::at(M::PROFILE_SHARED.swept, 0).arrive();
            let store = Store { samples, offset: results.rows.offset, lane, first_column: columns * COLUMNS };
            store.mask::<M>(place(mask), results.rows.total(), &mut results.all);
        }
        mask = next_sweep(mask, lost);
    }
}

/// Where a consumer warpgroup is: at a tile, which lies in a slot.
struct Cursor {
    tile: u32,
    slot: Slot,
}

struct Consumer {
    lane: u32,
    warpgroup: u32,
    /// Its columns of V begin at 64 x `columns`.
    columns: u32,
    /// The two samples of the thread.
    samples: [u32; 2],
    /// End of the video in the spatial layout.
    end: u32,
}

impl Consumer {
    /// Goes over `tiles`, and returns the results. In earlier sweeps `tiles_before` tiles went
    /// through the stages. With `MASKED`, keys that `mask` hides count for nothing.
    #[inline(always)]
    unsafe fn sweep<M: Hopper, const MASKED: bool>(
        &self,
        mask: u32,
        tiles: &Range<u32>,
        tiles_before: u32,
    ) -> Results<M> {
        let mut results = Results::<M>::new();
        self.take_in::<M, MASKED>(mask, tiles, tiles_before, &mut results);
        if Map::<M>::TURNS {
            results.merge_turns::<MASKED>(self.warpgroup);
        }
        results
    }

    /// Takes the warpgroup's share of `tiles` into `results`.
    #[inline(always)]
    unsafe fn take_in<M: Hopper, const MASKED: bool>(
        &self,
        mask: u32,
        tiles: &Range<u32>,
        tiles_before: u32,
        results: &mut Results<M>,
    ) {
        let turn = if Map::<M>::TURNS { self.warpgroup } else { 0 };
        let slot = Slot::full(tiles_before + turn, Map::<M>::STAGES);
        let mut at = Cursor { tile: tiles.start + turn, slot: slot.uniform() };
        if at.tile >= tiles.end {
            return;
        }
        Barrier::at(M::PROFILE_SHARED.key_full, at.slot.stage).wait(at.slot.parity);
        let mut scores = self.first_scores::<M, MASKED>(mask, &at);
        if results.rows.start_plain::<M::Element>(&mut scores, self.warpgroup)
            && self.rounds::<M, MASKED, false>(mask, &mut at, tiles.end, &mut scores, results)
        {
            return;
        }
        loop {
            at.slot = at.slot.uniform();
            scores = self.first_scores::<M, MASKED>(mask, &at);
            results.lower::<MASKED>(&mut scores);
            if self.rounds::<M, MASKED, true>(mask, &mut at, tiles.end, &mut scores, results) {
                return;
            }
        }
    }

    /// S of the tile at `at`, which is there.
    #[inline(always)]
    unsafe fn first_scores<M: Hopper, const MASKED: bool>(
        &self,
        mask: u32,
        at: &Cursor,
    ) -> <M::Profile as Products>::Scores {
        let mut scores = <M::Profile as Products>::Scores::splat(0.0);
        M::Profile::start_scores(&mut scores, Map::<M>::query_image(), Map::<M>::key_image(at.slot));
        M::Profile::wait_scores::<0>(&mut scores);
        let seen = if MASKED {
            // The stage has been waited for. compute-sanitizer's racecheck does not believe it
            // without a barrier of this warpgroup.
            thread::any_of_warpgroup(false, self.warpgroup);
            self.seen::<M>(at.slot.stage)
        } else {
            [[0; 2]; CANDIDATES]
        };
        samples::hide::<MASKED>(mask, &mut scores, at.tile * KEY_ROWS, seen, self.end, self.lane);
        scores
    }

    /// The rounds of [`Consumer::take_in`], from the weights of the tile at `at` on, with the rows'
    /// offsets or (`OFFSETS` is false) with none.
    ///
    /// False means that the weights of a tile are too large. `at` is at that one then.
    #[inline(always)]
    unsafe fn rounds<M: Hopper, const MASKED: bool, const OFFSETS: bool>(
        &self,
        mask: u32,
        at: &mut Cursor,
        end: u32,
        scores: &mut <M::Profile as Products>::Scores,
        results: &mut Results<M>,
    ) -> bool {
        let value = |slot: Slot| Map::<M>::value_image(slot, self.columns);
        let stride = if Map::<M>::TURNS { CONSUMERS } else { 1 };
        let mut seen = self.seen::<M>(at.slot.stage);
        loop {
            Barrier::at(M::PROFILE_SHARED.value_full, at.slot.stage).wait(at.slot.parity);
            let mut weights = results.weights::<MASKED>(scores, seen, self.lane);
            at.tile += stride;
            if at.tile >= end {
                results.start_outputs::<MASKED>(&weights, value(at.slot));
                results.wait_outputs::<MASKED>(&mut weights);
                // All lanes must have read what they see of the tile.
                warp::sync();
                Barrier::at(M::PROFILE_SHARED.free, at.slot.stage).release(self.lane);
                return true;
            }
            let last = at.slot;
            at.slot = last.next(Map::<M>::STAGES);
            if Map::<M>::TURNS {
                at.slot = at.slot.next(Map::<M>::STAGES);
            }
            Barrier::at(M::PROFILE_SHARED.key_full, at.slot.stage).wait(at.slot.parity);
            results.rows.put_offsets::<OFFSETS>(scores);
            M::Profile::start_scores(scores, Map::<M>::query_image(), Map::<M>::key_image(at.slot));
            results.start_outputs::<MASKED>(&weights, value(last));
            seen = self.seen::<M>(at.slot.stage);
            // The products that have been started since may go on.
            if MASKED {
                M::Profile::wait_scores::<1>(scores);
            } else {
                M::Profile::wait_scores::<3>(scores);
            }
            samples::hide::<MASKED>(mask, scores, at.tile * KEY_ROWS, seen, self.end, self.lane);
            let fits = results.rows.absorb::<M::Element>(scores, self.warpgroup);
            results.wait_outputs::<MASKED>(&mut weights);
            Barrier::at(M::PROFILE_SHARED.free, last.stage).release(self.lane);
            if !fits {
                return false;
            }
        }
    }

    /// Which keys of the tile in a stage the thread's samples see, through each candidate mask.
    #[inline(always)]
    unsafe fn seen<M: Hopper>(&self, stage: u32) -> [[u64; 2]; CANDIDATES] {
        samples::seen(self.samples.map(
            #[inline(always)]
            |sample| Map::<M>::seen(stage, sample),
        ))
    }
}
