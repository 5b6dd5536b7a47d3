//! The body of **profile** for GPUs since Ampere. Two warps have the same 16 samples. Of a tile, each
//! weighs one half of the keys, and multiplies all weights with one half of the columns of V.
//!
//! There is one barrier for each tile. At it the warps exchange weights, in shared memory. Behind it
//! the products of a tile with its values stand beside those of the queries with the next tile's keys.
//! There are no producers: meanwhile, some threads look up which keys of a later tile each sample sees.

use core::ops::Range;

use super::results::Store;
use super::samples;
use super::{DENSE, KEY_ROWS, MASKS, SAMPLE_ROWS, block_tiles, next_sweep, number, sampled_row};
use crate::cuda::mma::{Fragment, HalfProducts, Matrices, Products, WarpProducts};
use crate::cuda::{math, shared, thread, warp};
use crate::element::Element;
use crate::masks::{CANDIDATES, band, each_candidate};
use crate::model::{Ampere, Model, valid_text};
use crate::ring::Ring;
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::PROFILE_WARPS;
use framestride_shapes::fragment::{self, row_of, thread_keys};
use framestride_shapes::layout::Visible;
use framestride_shapes::params::ProfileParams;
use framestride_shapes::shared::WarpProfileShared;

const THREADS: u32 = 32 * PROFILE_WARPS;

/// Keys of half a tile.
const HALF_ROWS: u32 = KEY_ROWS / 2;

/// Threads that look up what the samples see of one tile. Each has a sample and a candidate mask.
const LOOKERS: u32 = SAMPLE_ROWS * CANDIDATES as u32;

/// Groups of threads that take turns in looking.
const TURNS: u32 = THREADS / LOOKERS;

struct Map<M>(core::marker::PhantomData<M>);

impl<M: Model> Map<M> {
    const SHARED: WarpProfileShared = WarpProfileShared::new(M::IMAGE);

    /// Where a warp leaves its weights of a tile.
    #[inline(always)]
    fn weights(tile: u32, warp: u32) -> u32 {
        shared::address(Self::SHARED.weights, tile % 2 * PROFILE_WARPS + warp)
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
type Queries<M> = <<M as Model>::Profile as HalfProducts>::Queries;

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
    samples::copy::<M>(params, [group, head], query, [thread::index(), THREADS]);

    let looker = thread::index() % LOOKERS;
    let (candidate, sample) = (looker / SAMPLE_ROWS, looker % SAMPLE_ROWS);
    let video = sampled_row::<M>(params, head, group, sample);
    let first_row = own_warp / 2 * 16;
    // The samples are there.
    thread::sync_block();
    let block = Block::<M> {
        half_widths: params.half_widths(),
        looker: Looker { turn: thread::index() / LOOKERS, candidate, sample, video },
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
    let place_of_sees = |turn: u32, candidate: u32, sample: u32| {
        shared::address(Map::<M>::SHARED.sees_any, (turn * CANDIDATES as u32 + candidate) * SAMPLE_ROWS + sample)
    };
    shared::store_u32(place_of_sees(block.looker.turn, candidate, sample), sees_any as u32);
    block.give(DENSE, results.rows.total());
    each_candidate(
        #[inline(always)]
        |mask| block.give(number(mask), results.sums[mask].map(|sum| warp::sum::<4>(sum))),
    );
    thread::sync_block();
    let add = |[a, b]: [f32; 2]| a + b;
    let total = block.given(DENSE).map(add);
    let sums = [0, 1].map(|mask| block.given(number(mask)).map(add));
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
                    let sees_any = |turn: u32| shared::load_u32(place_of_sees(turn, mask as u32, block.samples[row]));
                    // A sum that is no number is lost as well.
                    (sees_any(0) | sees_any(1) != 0) & !(sums[mask][row] >= M::Element::DTYPE.least_masked_sum())
                },
            );
            lost |= (thread::any_of_block(is_lost[0] | is_lost[1]) as u32) << number(mask);
        },
    );
    let Results { rows, all, masked, .. } = &mut results;
    let store = block.store(rows);
    store.mask::<M>(place(DENSE), total, all);
    each_candidate(
        #[inline(always)]
        |mask| store.mask::<M>(place(number(mask)), sums[mask], &mut masked[mask]),
    );

    let mut mask = next_sweep(DENSE, lost);
    while mask != MASKS {
        let (mut results, _) = block.sweep::<true>(mask);
        block.give(DENSE, results.rows.total());
        thread::sync_block();
        let total = block.given(DENSE).map(add);
        block.store(&results.rows).mask::<M>(place(mask), total, &mut results.all);
        mask = next_sweep(mask, lost);
    }
}

/// What a thread has found for its two samples in a sweep, as the [results](super::results::Results) of
/// Hopper. Sums are those of the warp's half of the keys, outputs are of all keys.
struct Results<M: Model> {
    rows: Rows,
    all: Output<M>,
    sums: [[f32; 2]; CANDIDATES],
    masked: [Output<M>; CANDIDATES],
}

/// What a warp knows of its half of a tile.
struct Half<M: Model> {
    weights: Weights<M>,
    /// The sums of the thread's weights, before they were rounded.
    sums: [f32; 2],
    /// The same under each candidate mask.
    masked_sums: [[f32; 2]; CANDIDATES],
}

impl<M: Ampere> Results<M> {
    /// Those of no keys. Rows are plain.
    #[inline(always)]
    fn new() -> Results<M> {
        let output = Output::<M>::splat(0.0);
        Results { rows: Rows::plain([0.0; 2]), all: output, sums: [[0.0; 2]; CANDIDATES], masked: [output; CANDIDATES] }
    }

    /// Adds the products of half a tile. `seen` is what the samples see of it through each candidate
    /// mask.
    #[inline(always)]
    unsafe fn add<const MASKED: bool>(
        &mut self,
        weights: &Weights<M>,
        seen: [[u32; 2]; CANDIDATES],
        values: Matrices,
        lane: u32,
    ) {
        if MASKED {
            let mut outputs = [self.all];
            M::Profile::add_output(&mut outputs, &[*weights], values);
            [self.all] = outputs;
        } else {
            let kept = seen.map(
                #[inline(always)]
                |seen| M::Profile::keep_seen(weights, seen, lane),
            );
            let mut outputs = [self.all, self.masked[0], self.masked[1]];
            M::Profile::add_output(&mut outputs, &[*weights, kept[0], kept[1]], values);
            [self.all, self.masked[0], self.masked[1]] = outputs;
        }
    }

    /// Lowers the offsets for a tile whose largest scores are `max`, and turns the thread's scores of
    /// it into weights ([`Rows::lower`]). Rows of a first tile begin with offsets then.
    #[inline(always)]
    fn lower<const MASKED: bool>(&mut self, scores: &mut Scores<M>, max: [f32; 2], is_first: bool) {
        if is_first {
            self.rows = Rows::new();
        }
        let rescale = self.rows.lower_to::<M::Element>(scores, max);
        softmax::scale_rows(&mut self.all, rescale);
        if !MASKED {
            each_candidate(
                #[inline(always)]
                |mask| {
                    softmax::scale_rows(&mut self.masked[mask], rescale);
                    self.sums[mask] = [0, 1].map(|row| self.sums[mask][row] * rescale[row]);
                },
            );
        }
    }
}

/// A thread's part in looking up what samples see.
struct Looker {
    /// Of the numbers of tiles, the part that it looks at.
    turn: u32,
    /// Index of its candidate mask.
    candidate: u32,
    /// Its sample, counted in the group.
    sample: u32,
    /// The sample's row of the video.
    video: u32,
}

/// A thread, and what its block does.
struct Block<M: Ampere> {
    half_widths: [u32; CANDIDATES],
    looker: Looker,
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
        self.own_warp % 2
    }

    /// Goes over the tiles, and returns the results. With `MASKED`, keys that `mask` hides count for
    /// nothing. Also says whether the looker's sample sees any key in the looker's turns.
    #[inline(always)]
    unsafe fn sweep<const MASKED: bool>(&self, mask: u32) -> (Results<M>, bool) {
        let (tiles, image) = (&self.tiles, M::IMAGE);
        let mut ring = Ring {
            image,
            packed: self.packed,
            head_row: self.head_row,
            tiles: tiles.end - tiles.start,
            rows: KEY_ROWS,
            first_row: |tile: u32| (tiles.start + tile) * KEY_ROWS,
            slots: Map::<M>::SHARED.ring,
            stages: WarpProfileShared::stages(image),
            at_once: 2,
            threads: THREADS,
            slot: 1,
        };
        let own_half = self.half();
        let keys_at = |slot: u32| Matrices::by_columns(slot + image.bytes(HALF_ROWS) * own_half, image, self.lane);
        let values_at = |slot: u32, half: u32| {
            let first_chunk = own_half * image.row_chunks() / 2;
            Matrices::by_rows(slot + image.bytes(HALF_ROWS) * half, image, first_chunk, self.lane)
        };
        // All have their queries, and are done with the sweep before.
        thread::sync_block();
        ring.start();
        let mut all_seen = self.look(0);
        let mut results = Results::<M>::new();
        // There may be more splits than tiles of valid keys.
        if ring.tiles == 0 {
            results.rows = Rows::new();
            return (results, false);
        }
        ring.wait();
        thread::sync_block();
        all_seen |= self.look(1);
        let mut keys = keys_at(shared::address(Map::<M>::SHARED.ring, 0));
        let mut scores = self.scores::<MASKED>(mask, 0, keys);
        let sums = softmax::weigh(&mut scores);
        let mut fits = softmax::may_start_plain::<M::Element>(sums);
        let mut own = self.share::<MASKED>(&scores, sums, 0);
        let mut tile = 0;
        loop {
            ring.wait();
            if thread::any_of_block(!fits) {
                // The keys are still there.
                scores = self.scores::<MASKED>(mask, tile, keys);
                self.give(DENSE, softmax::max_of_rows(&mut scores));
                thread::sync_block();
                let max = self.given(DENSE).map(|[first, second]| first.max(second));
                results.lower::<MASKED>(&mut scores, max, tile == 0);
                own = self.share::<MASKED>(&scores, results.rows.tile_sum, tile);
                thread::sync_block();
            } else {
                results.rows.take(own.sums);
            }
            each_candidate(
                #[inline(always)]
                |mask| results.sums[mask] = [0, 1].map(|row| results.sums[mask][row] + own.masked_sums[mask][row]),
            );
            let [value, key] = ring.take_two(2 * tile + 1);
            all_seen |= self.look(tile + 2);
            let is_last = tile + 1 == ring.tiles;
            let seen = self.seen_by_weights::<MASKED>(tile, own_half);
            results.add::<MASKED>(&own.weights, seen, values_at(value, own_half), self.lane);
            // These products do not depend on the others, so that a warp need not wait for either.
            if !is_last {
                keys = keys_at(key);
                results.rows.put_offsets::<true>(&mut scores);
                M::Profile::add_half_scores(&mut scores, &self.queries, keys);
            }
            let twin = M::Profile::load_weights(Map::<M>::weights(tile, self.own_warp ^ 1), self.lane);
            let seen = self.seen_by_weights::<MASKED>(tile, 1 - own_half);
            results.add::<MASKED>(&twin, seen, values_at(value, 1 - own_half), self.lane);
            if is_last {
                return (results, all_seen != 0);
            }
            tile += 1;
            self.hide::<MASKED>(mask, &mut scores, tile);
            let sums = softmax::weigh(&mut scores);
            fits = softmax::fits::<M::Element>(sums);
            own = self.share::<MASKED>(&scores, sums, tile);
        }
    }

    /// Rounds the weights of the warp's half of a tile, and leaves them for its twin. `sums` are those
    /// of all of the thread's weights.
    #[inline(always)]
    unsafe fn share<const MASKED: bool>(&self, weights: &Scores<M>, sums: [f32; 2], tile: u32) -> Half<M> {
        let masked_sums = self.masked_sums::<MASKED>(weights, sums, tile);
        let weights = M::Profile::weights(weights);
        M::Profile::store_weights(&weights, Map::<M>::weights(tile, self.own_warp), self.lane);
        Half { weights, sums, masked_sums }
    }

    /// What the samples see of the weights of half a tile. Where `MASKED`, scores were hidden before.
    #[inline(always)]
    unsafe fn seen_by_weights<const MASKED: bool>(&self, tile: u32, half: u32) -> [[u32; 2]; CANDIDATES] {
        if MASKED { [[0; 2]; CANDIDATES] } else { self.seen(tile, half) }
    }

    /// S of the warp's half of a tile.
    #[inline(always)]
    unsafe fn scores<const MASKED: bool>(&self, mask: u32, tile: u32, keys: Matrices) -> Scores<M> {
        let mut scores = Scores::<M>::splat(0.0);
        M::Profile::add_half_scores(&mut scores, &self.queries, keys);
        self.hide::<MASKED>(mask, &mut scores, tile);
        scores
    }

    /// Sets the scores of keys that a sweep leaves out to -inf, of the warp's half of a tile. These are
    /// the keys behind the end, which nobody sees, or (`MASKED`) those that `mask` hides.
    #[inline(always)]
    unsafe fn hide<const MASKED: bool>(&self, mask: u32, scores: &mut Scores<M>, tile: u32) {
        let (lane, end) = (self.lane, self.end);
        let first = (self.tiles.start + tile) * KEY_ROWS;
        if MASKED {
            let keys = samples::through(mask, self.seen(tile, self.half()));
            softmax::replace_unseen(scores, keys.map(|keys| thread_keys(keys as u64, lane)), f32::NEG_INFINITY);
        } else if first + KEY_ROWS > end {
            let rows = [Visible { prefix: end, start: end, end }; 2];
            let seen = softmax::seen_keys(first + HALF_ROWS * self.half(), HALF_ROWS, lane, rows);
            softmax::replace_unseen(scores, seen, f32::NEG_INFINITY);
        }
    }

    /// The sums of the thread's weights in the warp's half of a tile, under each candidate mask.
    /// `tile_sum` are those of all its weights.
    #[inline(always)]
    unsafe fn masked_sums<const MASKED: bool>(
        &self,
        weights: &Scores<M>,
        tile_sum: [f32; 2],
        tile: u32,
    ) -> [[f32; 2]; CANDIDATES] {
        let mut sums = [[0.0; 2]; CANDIDATES];
        if !MASKED {
            let seen = self.seen(tile, self.half());
            each_candidate(
                #[inline(always)]
                |mask| {
                    let is_whole = |keys: u32| keys == 0 || keys == u32::MAX;
                    let keys = seen[mask];
                    if warp::any(!(is_whole(keys[0]) & is_whole(keys[1]))) {
                        let mut masked = *weights;
                        let own = keys.map(|keys| thread_keys(keys as u64, self.lane));
                        softmax::replace_unseen(&mut masked, own, 0.0);
                        masked.for_each(
                            #[inline(always)]
                            |i, weight| sums[mask][row_of(i)] += *weight,
                        );
                    } else {
                        // Most halves are wholly inside or outside of what a row sees.
                        sums[mask] = [0, 1].map(|row| if keys[row] != 0 { tile_sum[row] } else { 0.0 });
                    }
                },
            );
        }
        sums
    }

    /// Leaves values of the thread's samples for the other half, which are the same in all lanes of a
    /// quad.
    #[inline(always)]
    unsafe fn give(&self, mask: u32, values: [f32; 2]) {
        if self.lane % 4 == 0 {
            shared::store_f32(Map::<M>::half(mask, self.half(), self.samples[0]), values[0]);
            shared::store_f32(Map::<M>::half(mask, self.half(), self.samples[1]), values[1]);
        }
    }

    /// What both halves have left, for each of the thread's samples. A barrier of the block stands
    /// between the two.
    #[inline(always)]
    unsafe fn given(&self, mask: u32) -> [[f32; 2]; 2] {
        self.samples.map(
            #[inline(always)]
            |sample| [0, 1].map(|half| shared::load_f32(Map::<M>::half(mask, half, sample))),
        )
    }

    /// Looks up which keys of a tile, counted in the split, the looker's sample sees, if it is its
    /// turn. Another group of threads looks at the next one.
    #[inline(always)]
    unsafe fn look(&self, tile: u32) -> u64 {
        let Looker { turn, candidate, sample, video } = self.looker;
        let tiles = &self.tiles;
        if tile % TURNS != turn || tile >= tiles.end - tiles.start {
            return 0;
        }
        let first = (tiles.start + tile) * KEY_ROWS;
        let seen = band::sample_keys::<M>(self.half_widths, candidate, video, self.valid_text, first);
        shared::store_u32(Map::<M>::seen(tile, 0, sample) + candidate * 4, seen as u32);
        shared::store_u32(Map::<M>::seen(tile, 1, sample) + candidate * 4, (seen >> 32) as u32);
        seen
    }

    /// Which keys of half a tile the thread's samples see, through each candidate mask.
    #[inline(always)]
    unsafe fn seen(&self, tile: u32, half: u32) -> [[u32; 2]; CANDIDATES] {
        let places = self.samples.map(
            #[inline(always)]
            |sample| Map::<M>::seen(tile, half, sample),
        );
        [0, 1].map(
            #[inline(always)]
            |candidate| places.map(|place| shared::load_u32(place + candidate * 4)),
        )
    }

    #[inline(always)]
    fn store(&self, rows: &Rows) -> Store {
        let first_column = self.half() * M::HEAD_DIM / 2;
        Store { samples: self.samples, offset: rows.offset, lane: self.lane, first_column }
    }
}
