//! **profile** and **select**: which mask suits each head (Sparse VideoGen, section 4.1).
//!
//! profile: a block takes 64 sampled rows of one head and one split of its key tiles. The weights of a tile are computed once, relative
//! to an offset common to all masks, and multiplied with V three times: as they are (dense), and with what the spatial or the
//! temporal mask hides set to zero. Keys lie in the spatial layout: a row sees nearly every tile whole or not at all through the
//! spatial mask, and a run of each frame through the temporal one; the producers say which keys. A consumer warpgroup has registers
//! for three outputs of 64 columns: with head dim 128 both work on every tile, each on half of V's columns; with head dim 64 they
//! take turns on the tiles, and the first merges in what the second has. Grid: x = splits of the key tiles, y = groups of 64
//! samples, z = batch x heads.
//!
//! A mask may hide keys whose scores lie so far above the visible ones that weights relative to all keys lose the visible ones. Where
//! [`Dtype::least_masked_sum`](framestride_shapes::dtype::Dtype::least_masked_sum) says so for any sample, the block goes over its tiles again for that mask, and hides keys before the
//! softmax, so that the offsets are the mask's own. Each mask's results carry their offsets for that reason.
//!
//! select: merges the splits, and compares both masked outputs with the dense one. Grid: z = batch x heads.

use core::ops::Range;

use crate::cuda::barrier::{self, Barrier, Slot};
use crate::cuda::mma::{Descriptor, Fragment, TileProducts};
use crate::cuda::{copy, global, math, shared, thread, warp};
use crate::element::Element;
use crate::model::{Model, valid_text};
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::{
    PROFILE_COLUMNS as COLUMNS, PROFILE_CONSUMERS as CONSUMERS, PROFILE_KEY_ROWS as KEY_ROWS, PROFILE_THREADS,
    SAMPLE_ROWS, SELECT_THREADS, WARPGROUP, profile_stages,
};
use framestride_shapes::fragment::{self, row_of, thread_keys};
use framestride_shapes::layout::{HeadType, Layout, Visible};
use framestride_shapes::params::{PartialsLayout, ProfileParams, SelectParams};

/// Bytes that say which keys of a tile a sample sees: a bit for each, under each candidate mask.
const SEEN_BYTES: u32 = HeadType::CANDIDATES.len() as u32 * KEY_ROWS / 8;
const PRODUCER_REGISTERS: u32 = 24;
const CONSUMER_REGISTERS: u32 = 240;
/// Numbers of masks in the partial results. A sweep over the tiles has the number of the mask that it is for; the first, for all keys,
/// also gives the results of both masks.
const DENSE: u32 = 0;
const SPATIAL: u32 = 1;
const TEMPORAL: u32 = 2;
const MASKS: u32 = 3;

/// Where samples, tiles and barriers lie in shared memory, and how a block divides its work.
struct Plan<M>(core::marker::PhantomData<M>);

impl<M: Model> Plan<M> {
    const STAGES: u32 = profile_stages(M::IMAGE);
    const TILE_BYTES: u32 = M::IMAGE.bytes(KEY_ROWS);
    /// Whether the consumer warpgroups take turns on the tiles, instead of sharing the columns of each.
    const TURNS: bool = M::HEAD_DIM == COLUMNS;
    /// Warps that read a tile; as many have results in the end.
    const READERS: u32 = if Self::TURNS { 4 } else { CONSUMERS * 4 };

    #[inline(always)]
    fn query() -> u32 {
        shared::address(M::PROFILE_SHARED.query, 0)
    }
    #[inline(always)]
    fn key(stage: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.key, stage)
    }
    #[inline(always)]
    fn value(stage: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.value, stage)
    }
    #[inline(always)]
    fn query_image() -> Descriptor {
        Descriptor::image(Self::query(), M::ATOMS_BYTES)
    }
    #[inline(always)]
    fn key_image(slot: Slot) -> Descriptor {
        Descriptor::image(Self::key(slot.stage), M::ATOMS_BYTES)
    }
    /// From column 64 x `columns` on.
    #[inline(always)]
    fn value_image(slot: Slot, columns: u32) -> Descriptor {
        Descriptor::image(Self::value(slot.stage) + M::IMAGE.chunk(0, columns * (COLUMNS / 8)), M::ATOMS_BYTES)
    }
    /// Where the producers say which keys a sample sees ([`Visible::keys`]): through the spatial mask, then through the temporal one.
    #[inline(always)]
    fn seen(stage: u32, sample: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.seen, stage) + sample * SEEN_BYTES
    }
    /// Where the consumers leave the sum of a sample's weights under a mask, for the producers.
    #[inline(always)]
    fn masked_sum(mask: u32, sample: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.masked_sum, (mask - SPATIAL) * SAMPLE_ROWS + sample)
    }
    /// Where a producer warp says whether the sums of its samples have lost something.
    #[inline(always)]
    fn verdict(producer_warp: u32) -> u32 {
        shared::address(M::PROFILE_SHARED.verdict, producer_warp)
    }
    /// Of a sweep: every thread that has results has said what the producers must know, and all are done with the stages.
    #[inline(always)]
    fn swept() -> Barrier {
        Barrier::at(M::PROFILE_SHARED.swept, 0)
    }
    /// Of the verdicts.
    #[inline(always)]
    fn judged() -> Barrier {
        Barrier::at(M::PROFILE_SHARED.judged, 0)
    }
    /// Of keys, and of what the samples see of them.
    #[inline(always)]
    fn key_full(stage: u32) -> Barrier {
        Barrier::at(M::PROFILE_SHARED.key_full, stage)
    }
    #[inline(always)]
    fn value_full(stage: u32) -> Barrier {
        Barrier::at(M::PROFILE_SHARED.value_full, stage)
    }
    /// Of all of the stage.
    #[inline(always)]
    fn free(stage: u32) -> Barrier {
        Barrier::at(M::PROFILE_SHARED.free, stage)
    }

    /// Sizes of the partial results, for `splits` parts of the keys of a head.
    #[inline(always)]
    fn partials(splits: u32) -> PartialsLayout {
        let groups = M::PROFILE_ROWS.div_ceil(SAMPLE_ROWS);
        PartialsLayout { rows: M::PROFILE_ROWS, groups, splits, head_dim: M::HEAD_DIM }
    }
}

/// The body of **profile**.
///
/// # Safety
/// Launched with the table that `attention_kernels!` wrote for `M`; `params` as its documentation says.
#[inline(always)]
pub unsafe fn profile<M: Model>(params: &ProfileParams) {
    let (split, group, head) = (thread::block_x(), thread::block_y(), thread::block_z());
    let thread_warp = thread::warp();
    let valid_text = valid_text::<M>(params.text_lengths, head / params.heads);
    let end = valid_text + M::LAYOUT.video_tokens();
    let tiles = end.div_ceil(KEY_ROWS);
    // Splits that differ by one tile at most.
    let (share, rest) = (tiles / params.splits, tiles % params.splits);
    let first_tile = split * share + split.min(rest);
    let tiles = first_tile..first_tile + share + (split < rest) as u32;

    if thread::index() == 0 {
        let mut stage = 0;
        while stage < Plan::<M>::STAGES {
            Plan::<M>::key_full(stage).init(1 + 4);
            Plan::<M>::value_full(stage).init(1);
            Plan::<M>::free(stage).init(Plan::<M>::READERS);
            stage += 1;
        }
        Plan::<M>::swept().init(32 * Plan::<M>::READERS);
        Plan::<M>::judged().init(4);
        barrier::publish_initialised();
    }
    thread::sync_block();

    if thread_warp < 4 {
        thread::release_registers::<PRODUCER_REGISTERS>();
        Producer::new::<M>(params, thread_warp, [group, head], valid_text).run::<M>(params, head, tiles);
    } else {
        thread::take_registers::<CONSUMER_REGISTERS>();
        // The first tiles are on their way meanwhile.
        gather_samples::<M>(params, head, group, valid_text);
        shared::publish_to_async();
        thread::sync_two_warpgroups();
        consume::<M>(params, thread_warp - 4, [split, group, head], valid_text, tiles);
    }
}

/// Which masks have lost something, for all threads of the block: a bit each.
///
/// # Safety
/// The producers judge the sums.
#[inline(always)]
unsafe fn lost_masks<M: Model>() -> u32 {
    Plan::<M>::judged().wait(0);
    let [a, b, c, d] = shared::load16(Plan::<M>::verdict(0));
    warp::uniform((a | b) << SPATIAL | (c | d) << TEMPORAL)
}

/// The sweep after that of `mask`; [`MASKS`] when there is none.
#[inline(always)]
fn next_sweep(mask: u32, lost: u32) -> u32 {
    if mask < SPATIAL && lost & 1 << SPATIAL != 0 {
        SPATIAL
    } else if mask < TEMPORAL && lost & 1 << TEMPORAL != 0 {
        TEMPORAL
    } else {
        MASKS
    }
}

/// A thread of the producer warpgroup. The first keeps the stages full, and each works out which keys one sample sees through one
/// mask. The consumers would do that between two products, and with head dim 128 both of them.
struct Producer {
    lane: u32,
    /// The thread's mask.
    mask: u32,
    /// The thread's sample, of the group.
    sample: u32,
    /// Its row of the video.
    video: u32,
    valid_text: u32,
    slot: Slot,
}

impl Producer {
    #[inline(always)]
    unsafe fn new<M: Model>(
        params: &ProfileParams,
        producer_warp: u32,
        [group, head]: [u32; 2],
        valid_text: u32,
    ) -> Producer {
        let lane = thread::lane();
        let mask = if producer_warp >= 2 { TEMPORAL } else { SPATIAL };
        let sample = producer_warp % 2 * 32 + lane;
        let video = sampled_row::<M>(params, head, group, sample);
        Producer { lane, mask, sample, video, valid_text, slot: Slot::FIRST_FREE }
    }

    /// Brings the tiles for every sweep.
    #[inline(always)]
    unsafe fn run<M: Model>(mut self, params: &ProfileParams, head: u32, tiles: Range<u32>) {
        let (mut sweep, mut parity, mut lost) = (DENSE, 0, 0);
        while sweep != MASKS {
            let sees_any = self.bring::<M>(params, head, &tiles);
            Plan::<M>::swept().wait(parity);
            parity ^= 1;
            if sweep == DENSE {
                let sum = shared::load_f32(Plan::<M>::masked_sum(self.mask, self.sample));
                // A sum that is no number is lost as well.
                let is_lost = warp::any(sees_any & !(sum >= M::Element::DTYPE.least_masked_sum()));
                if self.lane == 0 {
                    shared::store_u32(Plan::<M>::verdict(thread::index() / 32), is_lost as u32);
                }
                Plan::<M>::judged().release(self.lane);
                lost = lost_masks::<M>();
            }
            // The consumers may have stored results where tiles come.
            shared::publish_to_async();
            sweep = next_sweep(sweep, lost);
        }
    }

    /// Brings the tiles once. Whether the thread's sample sees any of their keys.
    #[inline(always)]
    unsafe fn bring<M: Model>(&mut self, params: &ProfileParams, head: u32, tiles: &Range<u32>) -> bool {
        let head_bytes = M::IMAGE.bytes(M::LAYOUT.packed_rows()) as u64 * head as u64;
        let bytes = Plan::<M>::TILE_BYTES;
        let mut all_seen = 0;
        let mut tile = tiles.start;
        while tile < tiles.end {
            let (stage, rows) = (self.slot.stage, head_bytes + tile as u64 * bytes as u64);
            Plan::<M>::free(stage).wait(self.slot.parity);
            if thread::index() == 0 {
                Plan::<M>::key_full(stage).arrive_expecting(bytes);
                copy::to_shared(Plan::<M>::key(stage), params.packed_k + rows, bytes, Plan::<M>::key_full(stage));
                Plan::<M>::value_full(stage).arrive_expecting(bytes);
                copy::to_shared(Plan::<M>::value(stage), params.packed_v + rows, bytes, Plan::<M>::value_full(stage));
            }
            let first = tile * KEY_ROWS;
            let seen = if self.mask == TEMPORAL {
                keys_through_temporal::<M>(self.video, self.valid_text, first)
            } else {
                M::LAYOUT.visible(HeadType::Spatial, self.valid_text + self.video, self.valid_text).keys(first)
            };
            let place = Plan::<M>::seen(stage, self.sample) + (self.mask - SPATIAL) * 8;
            shared::store_u32(place, seen as u32);
            shared::store_u32(place + 4, (seen >> 32) as u32);
            warp::sync();
            Plan::<M>::key_full(stage).release(self.lane);
            all_seen |= seen;
            self.slot = self.slot.next(Plan::<M>::STAGES);
            tile += 1;
        }
        all_seen != 0
    }
}

/// [`Visible::keys`] of the sample that is row `video` of the video, through the temporal mask; keys lie in the spatial layout.
#[inline(always)]
fn keys_through_temporal<M: Model>(video: u32, valid_text: u32, first: u32) -> u64 {
    let Layout { frames, tokens_per_frame, sink_frames, .. } = M::LAYOUT;
    let position = video % tokens_per_frame * frames + video / tokens_per_frame;
    let prefix = valid_text + M::LAYOUT.sink_tokens();
    let mut frame = (first.saturating_sub(valid_text) / tokens_per_frame).max(sink_frames);
    let mut keys = 0;
    // Of each frame in the tile a run.
    loop {
        let first_token = valid_text + frame * tokens_per_frame;
        let [start, end] = M::LAYOUT.temporal_patches(position, frame);
        keys |= Visible { prefix, start: first_token + start, end: first_token + end }.keys(first);
        frame += 1;
        if frame >= frames || first_token + tokens_per_frame >= first + KEY_ROWS {
            return keys;
        }
    }
}

/// A consumer warpgroup: all samples of the block, on its own columns or its own tiles. `consumer_warp` counts over both.
#[inline(always)]
unsafe fn consume<M: Model>(
    params: &ProfileParams,
    consumer_warp: u32,
    [split, group, head]: [u32; 3],
    valid_text: u32,
    tiles: Range<u32>,
) {
    let lane = thread::lane();
    let warpgroup = consumer_warp / 4;
    let columns = if Plan::<M>::TURNS { 0 } else { warpgroup };
    let samples = fragment::thread_rows(consumer_warp % 4 * 16, lane);
    let end = valid_text + M::LAYOUT.video_tokens();
    let consumer = Consumer { lane, warpgroup, columns, samples, end };
    let plan = Plan::<M>::partials(params.splits);
    let partial = params.partials + plan.offset(head, group, split) * 4;
    let place = |mask: u32| partial + plan.mask_offset(mask) as u64 * 4;
    // With turns the first warpgroup has the results of both.
    let has_results = !Plan::<M>::TURNS || warpgroup == 0;

    let mut results = consumer.sweep::<M, false>(DENSE, &tiles, 0);
    if has_results {
        let Results { rows, sums, outputs: [dense, spatial, temporal] } = &mut results;
        // The quad's lanes hold the sums of their own columns of the tiles.
        let sums = sums.map(|rows| rows.map(|sum| warp::sum::<4>(sum)));
        if lane % 4 == 0 && columns == 0 {
            let mut row = 0;
            while row < 2 {
                shared::store_f32(Plan::<M>::masked_sum(SPATIAL, samples[row]), sums[0][row]);
                shared::store_f32(Plan::<M>::masked_sum(TEMPORAL, samples[row]), sums[1][row]);
                row += 1;
            }
        }
        Plan::<M>::swept().arrive();
        // The producers judge the sums meanwhile.
        let store = Store { samples, offset: rows.offset, lane, columns };
        store.mask::<M>(place(DENSE), rows.total(), dense);
        store.mask::<M>(place(SPATIAL), sums[0], spatial);
        store.mask::<M>(place(TEMPORAL), sums[1], temporal);
    }
    let lost = lost_masks::<M>();

    let mut tiles_before = 0;
    let mut mask = next_sweep(DENSE, lost);
    while mask != MASKS {
        tiles_before += tiles.end - tiles.start;
        let mut results = consumer.sweep::<M, true>(mask, &tiles, tiles_before);
        if has_results {
            Plan::<M>::swept().arrive();
            let store = Store { samples, offset: results.rows.offset, lane, columns };
            store.mask::<M>(place(mask), results.rows.total(), &mut results.outputs[0]);
        }
        mask = next_sweep(mask, lost);
    }
}

/// What a thread has found for its two samples in a sweep: over all keys, or (where `MASKED` says so in what follows) over those that one
/// mask shows. The latter has one output, the first, and no other sums than those of `rows`.
struct Results<M: Model> {
    /// Offsets and sums of weights of the sweep's keys.
    rows: Rows,
    /// Sums of weights under the spatial and the temporal mask.
    sums: [[f32; 2]; 2],
    /// Unnormalised: the sweep's keys, and those of them that the spatial and the temporal mask show.
    outputs: [<M::Profile as TileProducts>::Output; 3],
}

/// Where a consumer warpgroup is: a tile, and the slot that it lies in.
struct Place {
    tile: u32,
    slot: Slot,
}

struct Consumer {
    lane: u32,
    warpgroup: u32,
    /// Its columns of V: from 64 x `columns` on.
    columns: u32,
    /// The thread's.
    samples: [u32; 2],
    /// Of the video.
    end: u32,
}

impl Consumer {
    /// The results of `tiles`, through which `tiles_before` tiles have gone before in earlier sweeps. With `MASKED`, hidden keys of `mask`
    /// count for nothing.
    #[inline(always)]
    unsafe fn sweep<M: Model, const MASKED: bool>(
        &self,
        mask: u32,
        tiles: &Range<u32>,
        tiles_before: u32,
    ) -> Results<M> {
        let mut results = Results::<M> {
            rows: Rows::new(),
            sums: [[0.0; 2]; 2],
            outputs: [<M::Profile as TileProducts>::Output::splat(0.0); 3],
        };
        self.take_in::<M, MASKED>(mask, tiles, tiles_before, &mut results);
        if Plan::<M>::TURNS {
            results.merge_turns::<MASKED>(self.warpgroup);
        }
        results
    }

    /// Takes the warpgroup's share of `tiles` into `results`.
    #[inline(always)]
    unsafe fn take_in<M: Model, const MASKED: bool>(
        &self,
        mask: u32,
        tiles: &Range<u32>,
        tiles_before: u32,
        results: &mut Results<M>,
    ) {
        let turn = if Plan::<M>::TURNS { self.warpgroup } else { 0 };
        let slot = Slot::full(tiles_before + turn, Plan::<M>::STAGES);
        let mut place = Place { tile: tiles.start + turn, slot: slot.uniform() };
        if place.tile >= tiles.end {
            return;
        }
        Plan::<M>::key_full(place.slot.stage).wait(place.slot.parity);
        let mut scores = self.first_scores::<M, MASKED>(mask, &place);
        if results.rows.start_plain::<M::Element>(&mut scores, self.warpgroup)
            && self.rounds::<M, MASKED, false>(mask, &mut place, tiles.end, &mut scores, results)
        {
            return;
        }
        loop {
            place.slot = place.slot.uniform();
            scores = self.first_scores::<M, MASKED>(mask, &place);
            results.lower::<MASKED>(&mut scores);
            if self.rounds::<M, MASKED, true>(mask, &mut place, tiles.end, &mut scores, results) {
                return;
            }
        }
    }

    /// S of the tile at `place`, which is there.
    #[inline(always)]
    unsafe fn first_scores<M: Model, const MASKED: bool>(
        &self,
        mask: u32,
        place: &Place,
    ) -> <M::Profile as TileProducts>::Scores {
        let mut scores = <M::Profile as TileProducts>::Scores::splat(0.0);
        M::Profile::start_scores(&mut scores, Plan::<M>::query_image(), Plan::<M>::key_image(place.slot));
        scores.wait::<0>();
        let seen = if MASKED {
            // The stage has been waited for. compute-sanitizer's racecheck does not believe it without a barrier of this warpgroup.
            thread::any_of_warpgroup(false, self.warpgroup);
            self.seen::<M>(place.slot.stage)
        } else {
            [[0; 2]; 2]
        };
        self.hide::<MASKED>(mask, &mut scores, place.tile * KEY_ROWS, seen);
        scores
    }

    /// The rounds of [`Consumer::take_in`], from the weights of the tile at `place` on, with the rows' offsets or (`OFFSETS` is false) with
    /// none. False at a tile whose weights are too large, where `place` is then.
    #[inline(always)]
    unsafe fn rounds<M: Model, const MASKED: bool, const OFFSETS: bool>(
        &self,
        mask: u32,
        place: &mut Place,
        end: u32,
        scores: &mut <M::Profile as TileProducts>::Scores,
        results: &mut Results<M>,
    ) -> bool {
        let value = |slot: Slot| Plan::<M>::value_image(slot, self.columns);
        let stride = if Plan::<M>::TURNS { CONSUMERS } else { 1 };
        let mut seen = self.seen::<M>(place.slot.stage);
        loop {
            Plan::<M>::value_full(place.slot.stage).wait(place.slot.parity);
            let mut weights = results.weights::<MASKED>(scores, seen, self.lane);
            place.tile += stride;
            if place.tile >= end {
                results.start_outputs::<MASKED>(&weights, value(place.slot));
                results.wait_outputs::<MASKED>(&mut weights);
                // All lanes have read what they see of the tile.
                warp::sync();
                Plan::<M>::free(place.slot.stage).release(self.lane);
                return true;
            }
            let last = place.slot;
            place.slot = last.next(Plan::<M>::STAGES);
            if Plan::<M>::TURNS {
                place.slot = place.slot.next(Plan::<M>::STAGES);
            }
            Plan::<M>::key_full(place.slot.stage).wait(place.slot.parity);
            results.rows.put_offsets::<OFFSETS>(scores);
            M::Profile::start_scores(scores, Plan::<M>::query_image(), Plan::<M>::key_image(place.slot));
            results.start_outputs::<MASKED>(&weights, value(last));
            seen = self.seen::<M>(place.slot.stage);
            // The products that have been started since may go on.
            if MASKED {
                scores.wait::<1>();
            } else {
                scores.wait::<3>();
            }
            self.hide::<MASKED>(mask, scores, place.tile * KEY_ROWS, seen);
            let fits = results.rows.absorb::<M::Element>(scores, self.warpgroup);
            results.wait_outputs::<MASKED>(&mut weights);
            Plan::<M>::free(last.stage).release(self.lane);
            if !fits {
                return false;
            }
        }
    }

    /// What the thread's samples see of the tile in a stage: through the spatial mask, through the temporal one.
    #[inline(always)]
    unsafe fn seen<M: Model>(&self, stage: u32) -> [[u64; 2]; 2] {
        let word = |low: u32, high: u32| low as u64 | (high as u64) << 32;
        let [a, b, c, d] = shared::load16(Plan::<M>::seen(stage, self.samples[0]));
        let [e, f, g, h] = shared::load16(Plan::<M>::seen(stage, self.samples[1]));
        [[word(a, b), word(e, f)], [word(c, d), word(g, h)]]
    }

    /// Sets the scores of the keys that the sweep leaves out to -inf: those behind the video, which nobody sees, or those that `mask` hides.
    /// `seen` is that of the tile.
    #[inline(always)]
    fn hide<const MASKED: bool>(
        &self,
        mask: u32,
        scores: &mut impl Fragment,
        first: u32,
        [spatial, temporal]: [[u64; 2]; 2],
    ) {
        let end = self.end;
        if MASKED {
            let keys = if mask == SPATIAL { spatial } else { temporal };
            softmax::replace_unseen(scores, keys.map(|keys| thread_keys(keys, self.lane)), f32::NEG_INFINITY);
        } else if first + KEY_ROWS > end {
            let rows = [Visible { prefix: end, start: end, end }; 2];
            softmax::replace_unseen(scores, softmax::seen_keys(first, KEY_ROWS, self.lane, rows), f32::NEG_INFINITY);
        }
    }
}

impl<M: Model> Results<M> {
    /// Lowers the offsets for a tile of scores, and turns these into weights ([`Rows::lower`]).
    #[inline(always)]
    unsafe fn lower<const MASKED: bool>(&mut self, scores: &mut <M::Profile as TileProducts>::Scores) {
        let rescale = self.rows.lower::<M::Element>(scores);
        let [dense, spatial, temporal] = &mut self.outputs;
        softmax::scale_rows(dense, rescale);
        if !MASKED {
            softmax::scale_rows(spatial, rescale);
            softmax::scale_rows(temporal, rescale);
            self.sums = self.sums.map(|sum| [sum[0] * rescale[0], sum[1] * rescale[1]]);
        }
    }

    /// Rounds the weights of a tile for each output. Adds those that the spatial and the temporal mask keep to their sums.
    #[inline(always)]
    unsafe fn weights<const MASKED: bool>(
        &mut self,
        dense: &<M::Profile as TileProducts>::Scores,
        [spatial, temporal]: [[u64; 2]; 2],
        lane: u32,
    ) -> [<M::Profile as TileProducts>::Weights; 3] {
        let all = M::Profile::weights(dense);
        if MASKED {
            return [all; 3];
        }
        let [spatial_sum, temporal_sum] = &mut self.sums;
        let spatial = keep_seen::<M>(dense, &all, self.rows.tile_sum, spatial, lane, spatial_sum);
        let temporal = keep_seen::<M>(dense, &all, self.rows.tile_sum, temporal, lane, temporal_sum);
        [all, spatial, temporal]
    }

    /// The products with V, a group for each output.
    #[inline(always)]
    unsafe fn start_outputs<const MASKED: bool>(
        &mut self,
        weights: &[<M::Profile as TileProducts>::Weights; 3],
        value: Descriptor,
    ) {
        let [dense, spatial, temporal] = &mut self.outputs;
        M::Profile::start_output(dense, &weights[0], value);
        if !MASKED {
            M::Profile::start_output(spatial, &weights[1], value);
            M::Profile::start_output(temporal, &weights[2], value);
        }
    }

    /// Waits for all products.
    #[inline(always)]
    unsafe fn wait_outputs<const MASKED: bool>(&mut self, weights: &mut [<M::Profile as TileProducts>::Weights; 3]) {
        let [dense, spatial, temporal] = &mut self.outputs;
        M::Profile::wait_output(dense, &mut weights[0]);
        if !MASKED {
            M::Profile::wait_output(spatial, &mut weights[1]);
            M::Profile::wait_output(temporal, &mut weights[2]);
        }
    }

    /// Gives the first warpgroup the results of both. They have had different tiles, and so have different offsets.
    #[inline(always)]
    unsafe fn merge_turns<const MASKED: bool>(&mut self, warpgroup: u32) {
        let Results { rows, sums, outputs: [dense, spatial, temporal] } = self;
        const PER_OUTPUT: u32 = COLUMNS / 2;
        // Where tiles were: a value of one thread lies beside that of the next.
        let place = |index: u32| Plan::<M>::key(0) + (index * 128 + thread::index() % 128) * 4;
        // Both are done with the tiles.
        thread::sync_two_warpgroups();
        if warpgroup == 1 {
            let mut row = 0;
            while row < 2 {
                shared::store_f32(place(row), rows.offset[row as usize]);
                shared::store_f32(place(2 + row), rows.sum[row as usize]);
                shared::store_f32(place(4 + row), sums[0][row as usize]);
                shared::store_f32(place(6 + row), sums[1][row as usize]);
                row += 1;
            }
            dense.for_each(
                #[inline(always)]
                |i, value| shared::store_f32(place(8 + i), *value),
            );
            if !MASKED {
                spatial.for_each(
                    #[inline(always)]
                    |i, value| shared::store_f32(place(8 + PER_OUTPUT + i), *value),
                );
                temporal.for_each(
                    #[inline(always)]
                    |i, value| shared::store_f32(place(8 + 2 * PER_OUTPUT + i), *value),
                );
            }
        }
        thread::sync_two_warpgroups();
        if warpgroup == 0 {
            let offset = [0, 1].map(|row| rows.offset[row as usize].min(shared::load_f32(place(row))));
            let own = [0, 1].map(|row| math::exp2(offset[row] - rows.offset[row]));
            let other = [0, 1].map(|row| math::exp2(offset[row as usize] - shared::load_f32(place(row))));
            let add = |value: f32, row: usize, index: u32| {
                math::fma(value, own[row], shared::load_f32(place(index)) * other[row])
            };
            rows.offset = offset;
            rows.sum = [0, 1].map(|row| add(rows.sum[row], row, 2 + row as u32));
            sums[0] = [0, 1].map(|row| add(sums[0][row], row, 4 + row as u32));
            sums[1] = [0, 1].map(|row| add(sums[1][row], row, 6 + row as u32));
            dense.for_each(
                #[inline(always)]
                |i, value| *value = add(*value, row_of(i), 8 + i),
            );
            if !MASKED {
                spatial.for_each(
                    #[inline(always)]
                    |i, value| *value = add(*value, row_of(i), 8 + PER_OUTPUT + i),
                );
                temporal.for_each(
                    #[inline(always)]
                    |i, value| *value = add(*value, row_of(i), 8 + 2 * PER_OUTPUT + i),
                );
            }
        }
    }
}

/// Video row, frame-major, of a sample; samples beyond the last repeat it.
#[inline(always)]
fn sampled_row<M: Model>(params: &ProfileParams, head: u32, group: u32, sample: u32) -> u32 {
    let index = (group * SAMPLE_ROWS + sample).min(M::PROFILE_ROWS - 1);
    M::LAYOUT.sampled_video_row(params.seed, head, index, M::PROFILE_ROWS)
}

/// Copies the sampled rows of packed Q into the image of a query tile. All consumers take part.
#[inline(always)]
unsafe fn gather_samples<M: Model>(params: &ProfileParams, head: u32, group: u32, valid_text: u32) {
    let packed_q = params.packed_q + M::IMAGE.bytes(M::LAYOUT.packed_rows()) as u64 * head as u64;
    const THREADS: u32 = CONSUMERS * WARPGROUP;
    let mut chunk = thread::index() - (PROFILE_THREADS - THREADS);
    let chunks = M::IMAGE.row_chunks();
    while chunk < SAMPLE_ROWS * chunks {
        let (sample, column) = (chunk / chunks, chunk % chunks);
        let row = valid_text + sampled_row::<M>(params, head, group, sample);
        let from = packed_q + M::IMAGE.chunk(row, column) as u64;
        shared::store16(Plan::<M>::query() + M::IMAGE.chunk(sample, column), global::load16(from));
        chunk += THREADS;
    }
}

/// The weights of `seen` keys, rounded; adds them to `sum`. `dense` are those of all keys, `all` the same rounded, `tile_sum` their sum.
#[inline(always)]
unsafe fn keep_seen<M: Model>(
    dense: &<M::Profile as TileProducts>::Scores,
    all: &<M::Profile as TileProducts>::Weights,
    tile_sum: [f32; 2],
    seen: [u64; 2],
    lane: u32,
    sum: &mut [f32; 2],
) -> <M::Profile as TileProducts>::Weights {
    let is_whole = |keys: u64| keys == 0 || keys == u64::MAX;
    if warp::any(!(is_whole(seen[0]) & is_whole(seen[1]))) {
        let mut masked = *dense;
        let own = seen.map(|keys| thread_keys(keys, lane));
        softmax::replace_unseen(&mut masked, own, 0.0);
        masked.for_each(
            #[inline(always)]
            |i, weight| sum[row_of(i)] += *weight,
        );
        M::Profile::weights(&masked)
    } else {
        // Most tiles are wholly inside or outside of what a row sees.
        *sum = [0, 1].map(|row| if seen[row] != 0 { sum[row] + tile_sum[row] } else { sum[row] });
        M::Profile::and_rows(all, seen.map(|keys| if keys != 0 { u32::MAX } else { 0 }))
    }
}

/// Where a thread's results belong: its two samples, their offsets, and columns from `64 columns` on.
struct Store {
    samples: [u32; 2],
    offset: [f32; 2],
    lane: u32,
    columns: u32,
}

impl Store {
    /// Writes offsets, sums and unnormalised outputs under one mask, `place` being where the mask's begin.
    #[inline(always)]
    unsafe fn mask<M: Model>(&self, place: u64, sums: [f32; 2], output: &mut impl Fragment) {
        let Store { samples, offset, lane, columns } = *self;
        if lane % 4 == 0 && columns == 0 {
            let mut row = 0;
            while row < 2 {
                global::store_f32(place + samples[row] as u64 * 4, -offset[row]);
                global::store_f32(place + (SAMPLE_ROWS + samples[row]) as u64 * 4, sums[row]);
                row += 1;
            }
        }
        let column = columns * COLUMNS + fragment::first_column(lane);
        output.for_each_group(
            #[inline(always)]
            |group, [a, b, c, d]| {
                let row =
                    |row: usize| place + (2 * SAMPLE_ROWS + samples[row] * M::HEAD_DIM + group * 8 + column) as u64 * 4;
                global::store_f32x2(row(0), [*a, *b]);
                global::store_f32x2(row(1), [*c, *d]);
            },
        );
    }
}

/// The body of **select**: one warp a sample, then one thread a head.
///
/// # Safety
/// As [`profile`], after it on the same stream.
#[inline(always)]
pub unsafe fn select<M: Model>(params: &SelectParams) {
    let head = thread::block_z();
    let (own_warp, lane) = (thread::warp(), thread::lane());
    let mut errors = [0.0f32; 2];
    let mut row = own_warp;
    while row < M::PROFILE_ROWS {
        let sample = Sample::of::<M>(params, head, row);
        let mut column = lane * 2;
        // The first outputs are on their way while the factors are computed.
        let mut values = sample.values::<M>(column, 0);
        let factors = sample.factors(lane);
        while column < M::HEAD_DIM {
            if column >= 64 {
                values = sample.values::<M>(column, 0);
            }
            let [dense, spatial, temporal] = sample.merge::<M>(column, values, factors);
            let distance = |masked: [f32; 2], error: f32| {
                let distance = [masked[0] - dense[0], masked[1] - dense[1]];
                math::fma(distance[0], distance[0], math::fma(distance[1], distance[1], error))
            };
            errors = [distance(spatial, errors[0]), distance(temporal, errors[1])];
            column += 64;
        }
        row += SELECT_THREADS / 32;
    }
    let errors = errors.map(
        #[inline(always)]
        |error| warp::sum::<32>(error),
    );
    if lane == 0 {
        shared::store_f32(shared::base() + own_warp * 8, errors[0]);
        shared::store_f32(shared::base() + own_warp * 8 + 4, errors[1]);
    }
    thread::sync_block();
    if thread::index() == 0 {
        let mut total = [0.0f32; 2];
        let mut other = 0;
        while other < SELECT_THREADS / 32 {
            total[0] += shared::load_f32(shared::base() + other * 8);
            total[1] += shared::load_f32(shared::base() + other * 8 + 4);
            other += 1;
        }
        let mean = total.map(|error| error * (1.0 / (M::PROFILE_ROWS * M::HEAD_DIM) as f32));
        global::store_f32x2(params.errors + head as u64 * 8, mean);
        let head_type = if mean[1] < mean[0] { HeadType::Temporal } else { HeadType::Spatial };
        global::store_u32(params.head_types + head as u64 * 4, head_type as u32);
    }
}

/// What `add` makes of the values of all lanes, of three at a time, so that their exchanges overlap.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
unsafe fn reduce(mut values: [f32; 3], add: impl Fn(f32, f32) -> f32) -> [f32; 3] {
    let mut distance = 16;
    while distance > 0 {
        values = values.map(
            #[inline(always)]
            |value| add(value, warp::exchange(value, distance)),
        );
        distance /= 2;
    }
    values
}

/// The results of one sample in all splits.
struct Sample {
    /// First f32 of the first split.
    partials: u64,
    plan: PartialsLayout,
    /// The sample, of its group.
    sample: u32,
}

/// So many splits' outputs are loaded together.
const SPLITS_AT_ONCE: usize = 2;

/// Columns `column` and `column + 1` of the outputs of some splits, under dense, spatial and temporal.
type Values = [[[f32; 2]; 3]; SPLITS_AT_ONCE];

impl Sample {
    #[inline(always)]
    fn of<M: Model>(params: &SelectParams, head: u32, row: u32) -> Sample {
        let plan = Plan::<M>::partials(params.splits);
        let partials = params.partials + plan.offset(head, row / SAMPLE_ROWS, 0) * 4;
        Sample { partials, plan, sample: row % SAMPLE_ROWS }
    }

    /// By which the outputs of a split are multiplied, under dense, spatial and temporal, 0 where it has nothing to add: those of the
    /// split with the lane's number.
    #[inline(always)]
    unsafe fn factors(&self, lane: u32) -> [f32; 3] {
        let own = |index: u32| self.partials + (lane * self.plan.split_floats() + index + self.sample) as u64 * 4;
        let (mut offsets, mut sums) = ([0.0; 3], [0.0; 3]);
        if lane < self.plan.splits {
            let load = |mask: u32, index: u32| global::load_f32(own(self.plan.mask_offset(mask) + index));
            offsets = [load(DENSE, 0), load(SPATIAL, 0), load(TEMPORAL, 0)];
            sums = [load(DENSE, SAMPLE_ROWS), load(SPATIAL, SAMPLE_ROWS), load(TEMPORAL, SAMPLE_ROWS)];
        }
        // A sum below the normal numbers is 0: no key of the split is visible.
        let has_any = sums.map(|sum| sum >= f32::MIN_POSITIVE);
        let log_sums = [0, 1, 2].map(
            #[inline(always)]
            |mask| if has_any[mask] { offsets[mask] + math::log2(sums[mask]) } else { f32::NEG_INFINITY },
        );
        // Some split has a visible key, unless all is NaN; what is subtracted must be a number then too.
        let largest = reduce(log_sums, f32::max).map(|largest| largest.max(f32::MIN));
        let shares = [0, 1, 2].map(
            #[inline(always)]
            |mask| math::exp2(log_sums[mask] - largest[mask]),
        );
        let totals = reduce(shares, |sum, share| sum + share);
        [0, 1, 2].map(
            #[inline(always)]
            |mask| {
                // A division in full precision would be a call.
                let factor = shares[mask] * math::reciprocal(totals[mask]) * math::reciprocal(sums[mask]);
                if has_any[mask] { factor } else { 0.0 }
            },
        )
    }

    /// Loads the [`Values`] of splits from `first` on. Behind the last split that one's come again.
    #[inline(always)]
    unsafe fn values<M: Model>(&self, column: u32, first: u32) -> Values {
        let mut values = [[[0.0f32; 2]; 3]; SPLITS_AT_ONCE];
        let mut i = 0;
        while i < SPLITS_AT_ONCE {
            let split = (first + i as u32).min(self.plan.splits - 1) * self.plan.split_floats();
            let own = self.sample * M::HEAD_DIM + column;
            let load = |mask: u32| {
                let place = split + self.plan.mask_offset(mask) + 2 * SAMPLE_ROWS + own;
                global::load_f32x2(self.partials + place as u64 * 4)
            };
            values[i] = [load(DENSE), load(SPATIAL), load(TEMPORAL)];
            i += 1;
        }
        values
    }

    /// Columns `column` and `column + 1` of the output under each mask. `values` are those of the first splits, `factors` what
    /// [`Sample::factors`] gave each lane: 0 in lanes without a split, so that repeated values add nothing.
    #[inline(always)]
    unsafe fn merge<M: Model>(&self, column: u32, mut values: Values, factors: [f32; 3]) -> [[f32; 2]; 3] {
        let mut outputs = [[0.0f32; 2]; 3];
        let mut first = 0;
        loop {
            let mut i = 0;
            while i < SPLITS_AT_ONCE {
                let factors = [0, 1, 2].map(
                    #[inline(always)]
                    |mask| warp::broadcast(factors[mask], first + i as u32),
                );
                let add =
                    |mask: usize, half: usize| math::fma(factors[mask], values[i][mask][half], outputs[mask][half]);
                outputs = [[add(0, 0), add(0, 1)], [add(1, 0), add(1, 1)], [add(2, 0), add(2, 1)]];
                i += 1;
            }
            first += SPLITS_AT_ONCE as u32;
            if first >= self.plan.splits {
                return outputs;
            }
            values = self.values::<M>(column, first);
        }
    }
}
