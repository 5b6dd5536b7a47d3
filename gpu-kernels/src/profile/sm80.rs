//! The body of **profile** for GPUs since Ampere.
//!
//! With head dim 128, two warps have the same 16 samples. Of a tile, each weighs one half of the
//! keys, and multiplies all weights with one half of the columns of V. At the barrier of a tile
//! they exchange weights, in shared memory. With head dim 64 a warp has registers for all of both.
//! A multiprocessor then holds two blocks, and one multiplies while the other waits.
//!
//! There is one barrier for each tile. Behind it the products of a tile with its values stand
//! beside those of the queries with the next tile's keys. Twins weigh the scores beside the rest of
//! the products. ptxas moves nothing across a branch, so there are few.
//!
//! Samples are sorted, so those of a warp lie in a quarter of the video. Where none of them sees a
//! half through the spatial mask, twins multiply nothing for it.
//!
//! There are no producers. The first threads also copy tiles. The last also look up which keys of a
//! later tile each sample sees.

use core::ops::{Add, Range};

use super::results::Store;
use super::samples;
use super::{DENSE, KEY_ROWS, MASKS, SAMPLE_ROWS, block_tiles, next_sweep, number, sampled_row};
use crate::cuda::mma::{BothProducts, Fragment, Matrices, Products, SampleProducts, WarpProducts};
use crate::cuda::{copy, math, shared, thread, warp};
use crate::element::Element;
use crate::masks::{CANDIDATES, band, each_candidate};
use crate::model::{Ampere, Model, valid_text};
use crate::ring::{Ring, RingShape};
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::{profile_parts, profile_warps};
use framestride_shapes::fragment::{self, column_of, row_of, thread_keys};
use framestride_shapes::layout::Visible;
use framestride_shapes::params::ProfileParams;
use framestride_shapes::shared::WarpProfileShared;

/// The last threads, which look up what the samples see of a tile. Each has a sample and a
/// candidate mask.
const LOOKERS: u32 = SAMPLE_ROWS * CANDIDATES as u32;

/// The first threads, which copy tiles. Where there are no twins they are all threads.
const COPIERS: u32 = 128;

struct Map<M>(core::marker::PhantomData<M>);

impl<M: Model> Map<M> {
    const SHARED: WarpProfileShared = WarpProfileShared::new(M::IMAGE);
    const WARPS: u32 = profile_warps(M::IMAGE);
    const THREADS: u32 = 32 * Self::WARPS;
    /// Whether two warps have the same samples.
    const TWINS: bool = profile_parts(M::IMAGE) == 2;
    const RING: RingShape = RingShape::new(M::IMAGE, KEY_ROWS, WarpProfileShared::STAGES, COPIERS / 32);
    /// Keys of a tile that a warp weighs.
    const KEYS: u32 = KEY_ROWS / profile_parts(M::IMAGE);

    /// Where a warp leaves its weights of a tile.
    #[inline(always)]
    fn weights(tile: u32, warp: u32) -> u32 {
        shared::address(Self::SHARED.weights, tile % 2 * Self::WARPS + warp)
    }

    /// Where it says which keys of half a tile a sample sees: a word for each candidate mask.
    #[inline(always)]
    fn seen(tile: u32, half: u32, sample: u32) -> u32 {
        let tile = tile % WarpProfileShared::SEEN_TILES;
        shared::address(Self::SHARED.seen, (tile * 2 + half) * SAMPLE_ROWS + sample)
    }

    /// Where a half says what the other must know of a sample, for a mask.
    #[inline(always)]
    fn half(mask: u32, half: u32, sample: u32) -> u32 {
        shared::address(Self::SHARED.halves, (mask * 2 + half) * SAMPLE_ROWS + sample)
    }
}

type Scores<M> = <<M as Model>::Profile as Products>::Scores;
type Weights<M> = <<M as Model>::Profile as Products>::Weights;
type Output<M> = <<M as Model>::Profile as Products>::Output;
type Queries<M> = <<M as Model>::Profile as SampleProducts>::Queries;

/// The body of **profile**.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, and `params` is as its
/// documentation says.
#[inline(always)]
pub unsafe fn profile<M: Ampere>(params: &ProfileParams) {
    let (split, group, head) = (thread::block_x(), thread::block_y(), thread::block_z());
    let (own_warp, lane) = (thread::warp(), thread::lane());
    let valid_text = valid_text::<M>(params.before_lengths, params.after_lengths, head / params.heads).sum();
    let end = valid_text + M::layout().video_tokens();
    let tiles = block_tiles(params, split, end);
    let query = shared::address(Map::<M>::SHARED.query, 0);
    samples::copy::<M>(params, [group, head], query, [thread::index(), Map::<M>::THREADS]);

    let first_row = own_warp / profile_parts(M::IMAGE) * 16;
    // The samples are there.
    thread::sync_block();
    let block = Block::<M> {
        half_widths: params.half_widths(),
        video: sampled_row::<M>(params, head, group, looker().1),
        packed: [params.packed_k, params.packed_v],
        head_row: head * M::layout().packed_rows(),
        tiles,
        valid_text,
        end,
        own_warp,
        lane,
        samples: fragment::thread_rows(first_row, lane),
        queries: M::Profile::queries(Matrices::by_rows(query + M::IMAGE.bytes(first_row), M::IMAGE, 0, lane)),
    };
    let (mut results, sees_any) = block.sweep::<false>(DENSE);
    let place_of_sees =
        |candidate: u32, sample: u32| shared::address(Map::<M>::SHARED.sees_any, candidate * SAMPLE_ROWS + sample);
    if block.looks() {
        let (candidate, sample) = looker();
        shared::store_u32(place_of_sees(candidate, sample), sees_any as u32);
    }
    let total = results.rows.total();
    let sums = results.sums.map(|rows| rows.map(|sum| warp::sum::<4>(sum)));
    block.give(DENSE, total);
    each_candidate(
        #[inline(always)]
        |mask| block.give(number(mask), sums[mask]),
    );
    thread::sync_block();
    let total = block.joined(DENSE, total, f32::add);
    let sums = [0, 1].map(|mask| block.joined(number(mask), sums[mask], f32::add));
    // What follows from it would take registers all through the tiles.
    let plan = M::partials(math::opaque(params.splits));
    let partial = params.partials + plan.offset(head, group, split) * 4;
    let place = |mask: u32| partial + plan.mask_offset(mask) as u64 * 4;
    let mut lost = 0;
    each_candidate(
        #[inline(always)]
        |mask| {
            let is_lost = [0, 1].map(
                #[inline(always)]
                |row| {
                    let sees_any = shared::load_u32(place_of_sees(mask as u32, block.samples[row])) != 0;
                    // A sum that is no number is lost as well.
                    sees_any & !(sums[mask][row] >= M::Element::DTYPE.least_masked_sum())
                },
            );
            lost |= (thread::any_of_block(is_lost[0] | is_lost[1]) as u32) << number(mask);
        },
    );
    let store = block.store(&results.rows);
    let [all, masked @ ..] = &mut results.outputs;
    store.mask::<M>(place(DENSE), total, all);
    each_candidate(
        #[inline(always)]
        |mask| store.mask::<M>(place(number(mask)), sums[mask], &mut masked[mask]),
    );

    let mut mask = next_sweep(DENSE, lost);
    while mask != MASKS {
        let (mut results, _) = block.sweep::<true>(mask);
        let total = results.rows.total();
        block.give(DENSE, total);
        thread::sync_block();
        let total = block.joined(DENSE, total, f32::add);
        block.store(&results.rows).mask::<M>(place(mask), total, &mut results.outputs[0]);
        mask = next_sweep(mask, lost);
    }
}

/// The candidate mask and the sample of a thread that looks.
#[inline(always)]
fn looker() -> (u32, u32) {
    // Either would take a register all through the tiles.
    let looker = math::opaque(thread::index()) % LOOKERS;
    (looker / SAMPLE_ROWS, looker % SAMPLE_ROWS)
}

/// What a thread has found for its two samples in a sweep. Sums are those of the keys that the warp
/// weighs, outputs are of all keys.
struct Results<M: Model> {
    rows: Rows,
    /// The output of the sweep's keys, which is not normalised, and those under each candidate
    /// mask.
    outputs: [Output<M>; 1 + CANDIDATES],
    /// The sums of weights under each candidate mask.
    sums: [[f32; 2]; CANDIDATES],
}

/// What a warp knows of the keys of a tile that it weighs: one half, where it has a twin.
struct Half<M: Model> {
    weights: Weights<M>,
    /// The sums of the thread's weights, before they were rounded.
    sums: [f32; 2],
    /// The sums under each candidate mask, of all tiles up to this one. Were they added behind the
    /// barrier, ptxas would do so behind the products, and hold both summands until then.
    masked_sums: [[f32; 2]; CANDIDATES],
}

impl<M: Ampere> Results<M> {
    /// Those of no keys. Rows are plain.
    #[inline(always)]
    fn new() -> Results<M> {
        Results {
            rows: Rows::plain([0.0; 2]),
            outputs: [Output::<M>::splat(0.0); 1 + CANDIDATES],
            sums: [[0.0; 2]; CANDIDATES],
        }
    }

    /// Adds the products of half a tile, of which the warp's samples see nothing through the
    /// spatial mask unless it `sees_spatial`.
    #[inline(always)]
    unsafe fn add<const MASKED: bool>(
        &mut self,
        sees_spatial: bool,
        weights: &[Weights<M>; 1 + CANDIDATES],
        values: Matrices,
    ) {
        if MASKED {
            let mut outputs = [self.outputs[0]];
            M::Profile::add_output(&mut outputs, &[weights[0]], values);
            [self.outputs[0]] = outputs;
        } else if sees_spatial {
            M::Profile::add_output(&mut self.outputs, weights, values);
        } else {
            let [all, _, temporal] = self.outputs;
            let mut outputs = [all, temporal];
            M::Profile::add_output(&mut outputs, &[weights[0], weights[2]], values);
            [self.outputs[0], self.outputs[2]] = outputs;
        }
    }

    /// The same, and puts the products of the queries with half of the next tile to `scores`.
    #[inline(always)]
    unsafe fn add_both<const MASKED: bool>(
        &mut self,
        sees_spatial: bool,
        weights: &[Weights<M>; 1 + CANDIDATES],
        values: Matrices,
        scores: &mut Scores<M>,
        queries: &Queries<M>,
        keys: Matrices,
    ) {
        let start = self.rows.offset;
        if MASKED {
            let mut outputs = [self.outputs[0]];
            M::Profile::add_both(&mut outputs, &[weights[0]], values, scores, start, queries, keys);
            [self.outputs[0]] = outputs;
        } else if sees_spatial {
            M::Profile::add_both(&mut self.outputs, weights, values, scores, start, queries, keys);
        } else {
            let [all, _, temporal] = self.outputs;
            let mut outputs = [all, temporal];
            M::Profile::add_both(&mut outputs, &[weights[0], weights[2]], values, scores, start, queries, keys);
            [self.outputs[0], self.outputs[2]] = outputs;
        }
    }

    /// Lowers the offsets for a tile whose largest scores are `max`, and turns the thread's scores
    /// of it into weights ([`Rows::lower`]). Rows of a first tile begin with offsets then.
    #[inline(always)]
    fn lower<const MASKED: bool>(&mut self, scores: &mut Scores<M>, max: [f32; 2], is_first: bool) {
        if is_first {
            self.rows = Rows::new();
        }
        let rescale = self.rows.lower_to::<M::Element>(scores, max);
        let [all, masked @ ..] = &mut self.outputs;
        softmax::scale_rows(all, rescale);
        if !MASKED {
            each_candidate(
                #[inline(always)]
                |mask| {
                    softmax::scale_rows(&mut masked[mask], rescale);
                    self.sums[mask] = [0, 1].map(|row| self.sums[mask][row] * rescale[row]);
                },
            );
        }
    }
}

/// A thread, and what its block does.
struct Block<M: Ampere> {
    half_widths: [u32; CANDIDATES],
    /// The row of the video of the sample that the thread looks for, if it looks.
    video: u32,
    /// Addresses of packed K and V.
    packed: [u64; 2],
    /// First row of the head, counted over all heads.
    head_row: u32,
    /// The tiles of the block's split.
    tiles: Range<u32>,
    valid_text: u32,
    /// End of the video in the spatial layout.
    end: u32,
    own_warp: u32,
    lane: u32,
    /// The two samples of the thread in products.
    samples: [u32; 2],
    queries: Queries<M>,
}

impl<M: Ampere> Block<M> {
    /// Which half of the keys and of the columns of V the warp has.
    #[inline(always)]
    fn half(&self) -> u32 {
        if Map::<M>::TWINS { self.own_warp % 2 } else { 0 }
    }

    /// Whether the thread copies tiles.
    #[inline(always)]
    fn copies(&self) -> bool {
        self.own_warp < COPIERS / 32
    }

    /// Whether the thread looks up what samples see.
    #[inline(always)]
    fn looks(&self) -> bool {
        thread::index() >= Map::<M>::THREADS - LOOKERS
    }

    /// Goes over the tiles, and returns the results. With `MASKED`, keys that `mask` hides count
    /// for nothing. Also says whether a looker's sample sees any key.
    #[inline(always)]
    unsafe fn sweep<const MASKED: bool>(&self, mask: u32) -> (Results<M>, bool) {
        let (tiles, image) = (&self.tiles, M::IMAGE);
        let row = |tile: u32| (tiles.start + tile) * KEY_ROWS;
        let count = tiles.end - tiles.start;
        let slots = Map::<M>::SHARED.ring;
        let mut ring = Ring::new(Map::<M>::RING, self.packed, self.head_row, slots, self.own_warp, self.lane);
        let ring_address = shared::address(slots, 0);
        let own_half = self.half();
        let keys_at = |slot: u32| Matrices::by_columns(slot + image.bytes(Map::<M>::KEYS) * own_half, image, self.lane);
        let values_at = |slot: u32, half: u32| {
            let first_chunk = own_half * image.row_chunks() / 2;
            Matrices::by_rows(slot + image.bytes(Map::<M>::KEYS) * half, image, first_chunk, self.lane)
        };
        // All have their queries, and are done with the sweep before.
        thread::sync_block();
        if self.copies() && count > 0 {
            ring.copy_keys(row(0), ring.first_slot(0));
            ring.copy_values(row(0), ring.first_slot(1));
            if count > 1 {
                ring.copy_keys(row(1), ring.first_slot(2));
            }
        }
        copy::commit_group();
        let mut all_seen = self.look(0);
        let mut results = Results::<M>::new();
        // There may be more splits than tiles of valid keys.
        if count == 0 {
            results.rows = Rows::new();
            return (results, false);
        }
        copy::wait_groups::<0>();
        thread::sync_block();
        all_seen |= self.look(1);
        let mut keys = keys_at(ring_address + ring.begin().own);
        let mut scores = self.scores::<MASKED>(mask, 0, keys);
        let sums = softmax::weigh(&mut scores);
        let mut fits = softmax::may_start_plain::<M::Element>(sums);
        let mut own = self.share::<MASKED>(&scores, sums, &results, 0);
        let mut tile = math::own_zero();
        loop {
            copy::wait_groups::<0>();
            if thread::any_of_block(!fits) {
                // The keys are still there.
                scores = self.scores::<MASKED>(mask, tile, keys);
                let max = softmax::max_of_rows(&mut scores);
                self.give(DENSE, max);
                thread::sync_block();
                let max = self.joined(DENSE, max, f32::max);
                results.lower::<MASKED>(&mut scores, max, tile == 0);
                own = self.share::<MASKED>(&scores, results.rows.tile_sum, &results, tile);
                thread::sync_block();
            } else {
                results.rows.take(own.sums);
            }
            results.sums = own.masked_sums;
            // Values, and the keys of the next tile.
            let steps = [ring.begin(), ring.begin()];
            if self.copies() {
                if tile + 1 < count {
                    ring.copy_values(row(tile + 1), steps[0].later);
                }
                if tile + 2 < count {
                    ring.copy_keys(row(tile + 2), steps[1].later);
                }
            }
            copy::commit_group();
            let [value, key] = steps.map(|slots| ring_address + slots.own);
            // Behind the last tile there are no keys. The values take their place, for no use.
            let is_last = tile + 1 == count;
            keys = keys_at(if is_last { value } else { key });
            let weights = self.kept::<MASKED>(own.weights, tile, own_half);
            let values = values_at(value, own_half);
            results.add_both::<MASKED>(
                self.sees_spatial::<MASKED>(tile, own_half),
                &weights,
                values,
                &mut scores,
                &self.queries,
                keys,
            );
            self.hide::<MASKED>(mask, &mut scores, tile + 1);
            if Map::<M>::TWINS {
                let twin = M::Profile::load_weights(Map::<M>::weights(tile, self.own_warp ^ 1), self.lane);
                let weights = self.kept::<MASKED>(twin, tile, 1 - own_half);
                results.add::<MASKED>(
                    self.sees_spatial::<MASKED>(tile, 1 - own_half),
                    &weights,
                    values_at(value, 1 - own_half),
                );
            }
            tile += 1;
            let sums = softmax::weigh(&mut scores);
            fits = softmax::fits::<M::Element>(sums);
            own = self.share::<MASKED>(&scores, sums, &results, tile);
            all_seen |= self.look(tile + 1);
            if is_last {
                return (results, all_seen != 0);
            }
        }
    }

    /// Rounds the weights of the keys that the warp weighs, and leaves them for its twin. `sums`
    /// are those of all of the thread's weights, and `before` has those of the tiles before.
    #[inline(always)]
    unsafe fn share<const MASKED: bool>(
        &self,
        weights: &Scores<M>,
        sums: [f32; 2],
        before: &Results<M>,
        tile: u32,
    ) -> Half<M> {
        let of_tile = self.masked_sums::<MASKED>(weights, tile);
        let masked_sums = [0, 1].map(|mask| [0, 1].map(|row| before.sums[mask][row] + of_tile[mask][row]));
        let weights = M::Profile::weights(weights);
        if Map::<M>::TWINS {
            M::Profile::store_weights(&weights, Map::<M>::weights(tile, self.own_warp), self.lane);
        }
        Half { weights, sums, masked_sums }
    }

    /// The weights of half a tile, and those that each candidate mask keeps. Where `MASKED`, scores
    /// were hidden before, and only the first are used.
    #[inline(always)]
    unsafe fn kept<const MASKED: bool>(
        &self,
        weights: Weights<M>,
        tile: u32,
        half: u32,
    ) -> [Weights<M>; 1 + CANDIDATES] {
        if MASKED {
            return [weights; 1 + CANDIDATES];
        }
        let [first, second] = self.seen(tile, half).map(
            #[inline(always)]
            |seen| M::Profile::keep_seen(&weights, seen, self.lane),
        );
        [weights, first, second]
    }

    /// S of the keys of a tile that the warp weighs.
    #[inline(always)]
    unsafe fn scores<const MASKED: bool>(&self, mask: u32, tile: u32, keys: Matrices) -> Scores<M> {
        let mut scores = Scores::<M>::splat(0.0);
        M::Profile::sample_scores(&mut scores, [0.0; 2], &self.queries, keys);
        self.hide::<MASKED>(mask, &mut scores, tile);
        scores
    }

    /// Sets the scores of keys that a sweep leaves out to -inf, of those that the warp weighs.
    /// These are the keys behind the end, which nobody sees, or (`MASKED`) those that `mask` hides.
    #[inline(always)]
    unsafe fn hide<const MASKED: bool>(&self, mask: u32, scores: &mut Scores<M>, tile: u32) {
        let (lane, end) = (self.lane, self.end);
        let first = (self.tiles.start + tile) * KEY_ROWS;
        if MASKED {
            let keys = samples::through(mask, self.seen(tile, self.half()));
            softmax::replace_unseen(scores, keys.map(|keys| thread_keys(keys, lane)), f32::NEG_INFINITY);
        } else if first + KEY_ROWS > end {
            let rows = [Visible { prefix: end, start: end, end }; 2];
            let seen = softmax::seen_keys(first + Map::<M>::KEYS * self.half(), Map::<M>::KEYS, lane, rows);
            softmax::replace_unseen(scores, seen, f32::NEG_INFINITY);
        }
    }

    /// The sums of the thread's weights of a tile, under each candidate mask.
    #[inline(always)]
    unsafe fn masked_sums<const MASKED: bool>(&self, weights: &Scores<M>, tile: u32) -> [[f32; 2]; CANDIDATES] {
        let mut sums = [[0.0; 2]; CANDIDATES];
        if !MASKED {
            let seen = self.seen(tile, self.half());
            each_candidate(
                #[inline(always)]
                |mask| {
                    let own = seen[mask].map(|keys| thread_keys(keys, self.lane) as u32);
                    let mut weights = *weights;
                    weights.for_each(
                        #[inline(always)]
                        |i, weight| {
                            let (row, key) = (row_of(i), column_of(i));
                            sums[mask][row] = math::add_if(own[row], 1 << key, sums[mask][row], *weight);
                        },
                    );
                },
            );
        }
        sums
    }

    /// Leaves values of the thread's samples for the other half, which are the same in all lanes of
    /// a quad.
    #[inline(always)]
    unsafe fn give(&self, mask: u32, values: [f32; 2]) {
        if Map::<M>::TWINS && self.lane % 4 == 0 {
            shared::store_f32(Map::<M>::half(mask, self.half(), self.samples[0]), values[0]);
            shared::store_f32(Map::<M>::half(mask, self.half(), self.samples[1]), values[1]);
        }
    }

    /// What both halves have left, joined, for each of the thread's samples. A barrier of the block
    /// stands between the two. `own` is what the warp has left itself.
    #[inline(always)]
    unsafe fn joined(&self, mask: u32, own: [f32; 2], join: impl Fn(f32, f32) -> f32) -> [f32; 2] {
        if !Map::<M>::TWINS {
            return own;
        }
        self.samples.map(
            #[inline(always)]
            |sample| {
                let [first, second] = [0, 1].map(|half| shared::load_f32(Map::<M>::half(mask, half, sample)));
                join(first, second)
            },
        )
    }

    /// Looks up which keys of a tile, counted in the split, the looker's sample sees, unless the
    /// thread copies. There are none behind the last tile.
    #[inline(always)]
    unsafe fn look(&self, tile: u32) -> u32 {
        if !self.looks() {
            return 0;
        }
        let (candidate, sample) = looker();
        let tile_of_all = self.tiles.start + tile;
        let seen = if tile_of_all < self.tiles.end {
            // What follows from it would take registers as well.
            let video = math::opaque(self.video);
            band::sample_keys::<M>(self.half_widths, candidate, video, self.valid_text, tile_of_all * KEY_ROWS)
        } else {
            0
        };
        shared::store_u32(Map::<M>::seen(tile, 0, sample) + candidate * 4, seen as u32);
        shared::store_u32(Map::<M>::seen(tile, 1, sample) + candidate * 4, (seen >> 32) as u32);
        seen as u32 | (seen >> 32) as u32
    }

    /// Whether any of the warp's samples sees a key of half a tile through the spatial mask.
    /// Without twins that is not asked, since skipping does not pay there.
    #[inline(always)]
    unsafe fn sees_spatial<const MASKED: bool>(&self, tile: u32, half: u32) -> bool {
        if !Map::<M>::TWINS || MASKED {
            return true;
        }
        let [[first, second], _] = self.seen(tile, half);
        warp::any(first | second != 0)
    }

    /// Which keys of a half, or of a tile where there are no twins, the thread's samples see,
    /// through each candidate mask.
    #[inline(always)]
    unsafe fn seen(&self, tile: u32, half: u32) -> [[u64; 2]; CANDIDATES] {
        let word = |candidate: u32, half: u32, sample: u32| {
            shared::load_u32(Map::<M>::seen(tile, half, sample) + candidate * 4) as u64
        };
        [0, 1].map(
            #[inline(always)]
            |candidate| {
                self.samples.map(
                    #[inline(always)]
                    |sample| {
                        let keys = word(candidate, half, sample);
                        if Map::<M>::TWINS { keys } else { keys | word(candidate, 1, sample) << 32 }
                    },
                )
            },
        )
    }

    #[inline(always)]
    fn store(&self, rows: &Rows) -> Store {
        let first_column = self.half() * M::HEAD_DIM / 2;
        Store { samples: self.samples, offset: rows.offset, lane: self.lane, first_column }
    }
}
