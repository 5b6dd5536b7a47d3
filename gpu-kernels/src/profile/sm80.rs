//! The body of **profile** for GPUs since Ampere. A warp has 16 samples and half of the columns of V,
//! so two warps compute the same weights.
//!
//! There are no producers. While the warps multiply, some threads look up which keys of the next tile
//! each sample sees.

use core::ops::Range;

use super::results::{Results, Store};
use super::samples::{self, hide};
use super::{DENSE, KEY_ROWS, MASKS, SAMPLE_ROWS, SEEN_BYTES, block_tiles, next_sweep, number, sampled_row};
use crate::cuda::mma::{Fragment, Matrices, Products, WarpProducts};
use crate::cuda::{shared, thread, warp};
use crate::element::Element;
use crate::masks::{CANDIDATES, band, each_candidate};
use crate::model::{Ampere, Model, valid_text};
use crate::ring::Ring;
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::PROFILE_WARPS;
use framestride_shapes::fragment;
use framestride_shapes::params::ProfileParams;
use framestride_shapes::shared::WarpProfileShared;

const THREADS: u32 = 32 * PROFILE_WARPS;

/// Threads that look up what the samples see of one tile. Each has a sample and a candidate mask.
const LOOKERS: u32 = SAMPLE_ROWS * CANDIDATES as u32;

/// Groups of threads that take turns in looking.
const TURNS: u32 = THREADS / LOOKERS;

struct Map<M>(core::marker::PhantomData<M>);

impl<M: Model> Map<M> {
    const SHARED: WarpProfileShared = WarpProfileShared::new(M::IMAGE);
}

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
    samples::gather::<M>(params, [group, head], valid_text, query, [thread::index(), THREADS]);

    let looker = thread::index() % LOOKERS;
    let (candidate, sample) = (looker / SAMPLE_ROWS, looker % SAMPLE_ROWS);
    let video = sampled_row::<M>(params, head, group, sample);
    let first_row = own_warp % 4 * 16;
    let columns = own_warp / 4;
    let block = Block {
        half_widths: params.half_widths(),
        looker: Looker { turn: thread::index() / LOOKERS, candidate, sample, video },
        packed: [params.packed_k, params.packed_v],
        head_row: head * M::layout().packed_rows(),
        tiles,
        valid_text,
        end,
        lane,
        samples: fragment::thread_rows(first_row, lane),
        queries: Matrices::by_rows(query + M::IMAGE.bytes(first_row), M::IMAGE, 0, lane),
        columns,
    };
    let plan = M::partials(params.splits);
    let partial = params.partials + plan.offset(head, group, split) * 4;
    let place = |mask: u32| partial + plan.mask_offset(mask) as u64 * 4;

    let (mut results, sees_any) = block.sweep::<M, false>(DENSE);
    // The lanes of a quad hold the sums of their own columns of the tiles.
    let sums = results.sums.map(|rows| rows.map(|sum| warp::sum::<4>(sum)));
    let place_of_sees = |turn: u32, candidate: u32, sample: u32| {
        shared::address(Map::<M>::SHARED.sees_any, (turn * CANDIDATES as u32 + candidate) * SAMPLE_ROWS + sample)
    };
    shared::store_u32(place_of_sees(block.looker.turn, candidate, sample), sees_any as u32);
    thread::sync_block();
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
    let store = block.store::<M>(rows);
    store.mask::<M>(place(DENSE), rows.total(), all);
    each_candidate(
        #[inline(always)]
        |mask| store.mask::<M>(place(number(mask)), sums[mask], &mut masked[mask]),
    );

    let mut mask = next_sweep(DENSE, lost);
    while mask != MASKS {
        let (mut results, _) = block.sweep::<M, true>(mask);
        block.store::<M>(&results.rows).mask::<M>(place(mask), results.rows.total(), &mut results.all);
        mask = next_sweep(mask, lost);
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
struct Block {
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
    lane: u32,
    /// The two samples of the thread in products.
    samples: [u32; 2],
    queries: Matrices,
    /// Which half of the columns of V the warp has.
    columns: u32,
}

impl Block {
    /// Goes over the tiles, and returns the results. With `MASKED`, keys that `mask` hides count for
    /// nothing. Also says whether the looker's sample sees any key in the looker's turns.
    #[inline(always)]
    unsafe fn sweep<M: Ampere, const MASKED: bool>(&self, mask: u32) -> (Results<M>, bool) {
        let (tiles, image) = (&self.tiles, M::IMAGE);
        let memory = Map::<M>::SHARED;
        let mut ring = Ring {
            image,
            packed: self.packed,
            head_row: self.head_row,
            tiles: tiles.end - tiles.start,
            rows: KEY_ROWS,
            first_row: |tile: u32| (tiles.start + tile) * KEY_ROWS,
            slots: memory.ring,
            stages: WarpProfileShared::STAGES,
            threads: THREADS,
            slot: 0,
        };
        // All are done with the sweep before.
        thread::sync_block();
        ring.start();
        let mut results = Results::<M>::new();
        let mut all_seen = self.look::<M>(0);
        let mut tile = 0;
        while tile < ring.tiles {
            let keys = Matrices::by_columns(ring.next::<false>(tile), image, self.lane);
            let first = (tiles.start + tile) * KEY_ROWS;
            let seen = self.seen::<M>(tile);
            let mut scores = [<M::Profile as Products>::Scores::splat(0.0)];
            if tile > 0 {
                results.rows.put_offsets::<true>(&mut scores[0]);
            }
            M::Profile::add_scores(&mut scores, self.queries, keys);
            hide::<MASKED>(mask, &mut scores[0], first, seen, self.end, self.lane);
            let sums = softmax::weigh(&mut scores[0]);
            let fits =
                if tile > 0 { softmax::fits::<M::Element>(sums) } else { softmax::may_start_plain::<M::Element>(sums) };
            if warp::any(!fits) {
                scores = [<M::Profile as Products>::Scores::splat(0.0)];
                M::Profile::add_scores(&mut scores, self.queries, keys);
                hide::<MASKED>(mask, &mut scores[0], first, seen, self.end, self.lane);
                results.lower::<MASKED>(&mut scores[0]);
            } else if tile > 0 {
                results.rows.take(sums);
            } else {
                results.rows = Rows::plain(sums);
            }
            let weights = results.weights::<MASKED>(&scores[0], seen, self.lane);
            all_seen |= self.look::<M>(tile + 1);
            let first_chunk = self.columns * image.row_chunks() / 2;
            let values = Matrices::by_rows(ring.next::<true>(tile), image, first_chunk, self.lane);
            results.add_outputs::<MASKED>(&weights, values);
            tile += 1;
        }
        (results, all_seen != 0)
    }

    /// Looks up which keys of a tile, counted in the split, the looker's sample sees, if it is its
    /// turn. Another group of threads looks at the next one.
    #[inline(always)]
    unsafe fn look<M: Ampere>(&self, tile: u32) -> u64 {
        let Looker { turn, candidate, sample, video } = self.looker;
        let tiles = &self.tiles;
        if tile % TURNS != turn || tile >= tiles.end - tiles.start {
            return 0;
        }
        let first = (tiles.start + tile) * KEY_ROWS;
        let seen = band::sample_keys::<M>(self.half_widths, candidate, video, self.valid_text, first);
        let place = seen_place::<M>(tile, sample) + candidate * 8;
        shared::store_u32(place, seen as u32);
        shared::store_u32(place + 4, (seen >> 32) as u32);
        seen
    }

    /// Which keys of a tile the thread's samples see, through each candidate mask.
    #[inline(always)]
    unsafe fn seen<M: Ampere>(&self, tile: u32) -> [[u64; 2]; CANDIDATES] {
        samples::seen(self.samples.map(|sample| seen_place::<M>(tile, sample)))
    }

    #[inline(always)]
    fn store<M: Ampere>(&self, rows: &Rows) -> Store {
        let first_column = self.columns * M::HEAD_DIM / 2;
        Store { samples: self.samples, offset: rows.offset, lane: self.lane, first_column }
    }
}

/// Where it says which keys of a tile a sample sees ([`keys`](framestride_shapes::layout::Visible::keys)): a u64 for each candidate mask.
#[inline(always)]
fn seen_place<M: Ampere>(tile: u32, sample: u32) -> u32 {
    shared::address(Map::<M>::SHARED.seen, tile % 2) + sample * SEEN_BYTES
}
