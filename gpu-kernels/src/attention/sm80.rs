//! The body of **attention** for GPUs since Ampere. Every warp takes part in the copies
//! (`cp.async`), and has 32 rows of the query tile, which it multiplies with `mma.sync`.
//!
//! Each warp decides alone whether its rows have offsets. There is one loop for both, so that all
//! warps wait at the same barriers.

use core::marker::PhantomData;

use super::order;
use super::store::{Sums, store};
use super::work::Work;
use crate::cuda::mma::{Fragment, Matrices, Products, WarpProducts};
use crate::cuda::{shared, thread, warp};
use crate::masks::Mask;
use crate::masks::band::Band;
use crate::model::{Ampere, Model};
use crate::ring::{Ring, copy_rows};
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::{WARP_BLOCKS, WARP_ROWS};
use framestride_shapes::fragment;
use framestride_shapes::layout::{RangeVisible, Visible};
use framestride_shapes::params::AttentionParams;
use framestride_shapes::shared::WarpAttentionShared;

type Scores<M> = [<<M as Model>::Attention as Products>::Scores; WARP_BLOCKS];
type Weights<M> = [<<M as Model>::Attention as Products>::Weights; WARP_BLOCKS];
type Output<M> = [<<M as Model>::Attention as Products>::Output; WARP_BLOCKS];

/// Calls `f` with the number of each block of 16 rows that a warp has. The calls are unrolled.
#[inline(always)]
fn each_block(mut f: impl FnMut(usize)) {
    const { assert!(WARP_BLOCKS == 2, "there is one call for each block") };
    f(0);
    f(1);
}

struct Map<M>(PhantomData<M>);

impl<M: Model> Map<M> {
    const SHARED: WarpAttentionShared = WarpAttentionShared::new(M::TILES, M::IMAGE);
    /// Each thread also has a row of the query tile.
    const THREADS: u32 = {
        assert!(WARP_ROWS == 32);
        M::TILES.query_rows
    };
}

/// The kernel's body.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, and `params` is as its
/// documentation says.
#[inline(always)]
pub unsafe fn attention<M: Ampere>(params: &AttentionParams) {
    let memory = Map::<M>::SHARED;
    let (own_warp, lane) = (thread::warp(), thread::lane());
    let mut index = thread::block_x();
    while index < order::count::<M>(params) {
        // All warps are done with what lies in shared memory.
        thread::sync_block();
        if thread::index() == 0 {
            shared::store_u32(shared::address(memory.work, 0), index);
            shared::store_u32(shared::address(memory.work, 1), order::take_next(params));
        }
        let work = Work::<M>::at(params, index);
        let mask = work.mask.uniform();
        let warp_row = work.first_row + own_warp * WARP_ROWS;
        // What a row sees would take registers all through the tiles. Rows begin with an offset of
        // 0.
        let [Visible { prefix, start, end }, _] = mask.thread([work.first_row + thread::index(); 2]);
        shared::store16(shared::address(memory.seen, thread::index()), [prefix, start, end, 0]);
        let mut rows = [Rows::new(); WARP_BLOCKS];
        let mut output = [<M::Attention as Products>::Output::splat(0.0); WARP_BLOCKS];
        if mask.tiles() > 0 {
            let warp_sees = mask.warp(warp_row, WARP_ROWS);
            if lane == 0 {
                let RangeVisible { prefix, all_start, all_end, .. } = warp_sees;
                shared::store16(shared::address(memory.warp_seen, own_warp), [prefix, all_start, all_end, 0]);
            }
            let hide = |scores: &mut Scores<M>, tile: u32| {
                let first = mask.first_key(tile);
                let [prefix, all_start, all_end, _] = shared::load16(shared::address(memory.warp_seen, own_warp));
                if !Band::<M>::sees_all(&RangeVisible { prefix, all_start, all_end, ..warp_sees }, first) {
                    each_block(
                        #[inline(always)]
                        |block| {
                            let thread_rows = fragment::thread_rows(own_warp * WARP_ROWS + 16 * block as u32, lane);
                            let sees = thread_rows.map(
                                #[inline(always)]
                                |row| {
                                    let [prefix, start, end, _] = shared::load16(shared::address(memory.seen, row));
                                    Visible { prefix, start, end }
                                },
                            );
                            let seen = Band::<M>::seen_keys(&sees, first, lane);
                            softmax::replace_unseen(&mut scores[block], seen, f32::NEG_INFINITY);
                        },
                    );
                }
            };
            let query = shared::address(memory.query, 0);
            let head_row = work.head * M::layout().packed_rows();
            copy_rows(
                M::IMAGE,
                Map::<M>::THREADS,
                query,
                params.packed_q,
                head_row + work.first_row,
                M::TILES.query_rows,
            );
            let ring = Ring {
                image: M::IMAGE,
                packed: [params.packed_k, params.packed_v],
                head_row,
                tiles: mask.tiles(),
                rows: M::TILES.key_rows,
                first_row: |tile: u32| mask.first_key(tile),
                slots: memory.ring,
                stages: M::TILES.stages,
                at_once: 1,
                threads: Map::<M>::THREADS,
                copies: true,
                slot: 0,
            };
            ring.start();
            let queries = Matrices::by_rows(query + M::IMAGE.bytes(WARP_ROWS) * own_warp, M::IMAGE, 0, lane);
            let mut warp = Warp { lane, queries, ring, model: PhantomData::<M> };
            warp.sweep(hide, &mut rows, &mut output);
        }
        // The query tile is found again, since it would take registers all through the key tiles.
        thread::sync_block();
        let tile = |which: u32| warp::broadcast(shared::load_u32(shared::address(memory.work, which)), 0);
        let work = Work::<M>::at(params, tile(0));
        index = tile(1);
        let warp_row = work.first_row + own_warp * WARP_ROWS;
        each_block(
            #[inline(always)]
            |block| {
                let thread_rows = fragment::thread_rows(warp_row + 16 * block as u32, lane);
                let offset = offset_places::<M>(block, lane).map(|place| shared::load_f32(place));
                let sums = Sums { offset, total: rows[block].total() };
                store::<M>(params, &work, &mut output[block], sums, thread_rows, lane, |_, means| means);
            },
        );
    }
    if thread::index() == 0 {
        order::leave(params);
    }
}

/// A warp, and where it is.
struct Warp<M, F> {
    lane: u32,
    /// Its query rows.
    queries: Matrices,
    ring: Ring<F>,
    model: PhantomData<M>,
}

/// A key tile, and its keys.
#[derive(Clone, Copy)]
struct Keys {
    tile: u32,
    keys: Matrices,
}

impl<M: Ampere, F: Fn(u32) -> u32> Warp<M, F> {
    /// Goes over the key tiles of a query tile. It takes all weights into `rows`, and their
    /// products with V into `output`. `hide` sets the scores of unseen keys of a tile to -inf.
    #[inline(always)]
    unsafe fn sweep(
        &mut self,
        hide: impl Fn(&mut Scores<M>, u32),
        rows: &mut [Rows; WARP_BLOCKS],
        output: &mut Output<M>,
    ) {
        let mut at = self.next_keys(0);
        let mut scores = self.scores(at);
        hide(&mut scores, 0);
        let mut has_offsets = !start_plain::<M>(rows, &mut scores);
        if has_offsets {
            self.lower([[softmax::NOTHING_SEEN; 2]; WARP_BLOCKS], at, &hide, &mut scores, rows, output);
        }
        loop {
            // These wait for the values, since they take half as many registers as the scores.
            let weights = weights::<M>(&scores);
            let values = Matrices::by_rows(self.next(2 * at.tile + 1), M::IMAGE, 0, self.lane);
            M::Attention::add_output(output, &weights, values);
            if at.tile + 1 == self.ring.tiles {
                return;
            }
            at = self.next_keys(at.tile + 1);
            scores = self.scores(at);
            hide(&mut scores, at.tile);
            if has_offsets {
                let offsets = self.offsets();
                each_block(
                    #[inline(always)]
                    |block| softmax::add_to_rows(&mut scores[block], offsets[block]),
                );
            }
            if !absorb::<M>(rows, &mut scores) {
                self.lower(self.offsets(), at, &hide, &mut scores, rows, output);
                has_offsets = true;
            }
        }
    }

    /// Computes the scores of a tile again, whose weights are too large with these offsets. Lowers
    /// the offsets for it, and turns the scores into weights.
    #[inline(always)]
    unsafe fn lower(
        &self,
        offsets: [[f32; 2]; WARP_BLOCKS],
        at: Keys,
        hide: &impl Fn(&mut Scores<M>, u32),
        scores: &mut Scores<M>,
        rows: &mut [Rows; WARP_BLOCKS],
        output: &mut Output<M>,
    ) {
        *scores = self.scores(at);
        hide(scores, at.tile);
        // All lanes have read what stands beside the offsets.
        warp::sync();
        each_block(
            #[inline(always)]
            |block| {
                rows[block].offset = offsets[block];
                let rescale = rows[block].lower::<M::Element>(&mut scores[block]);
                softmax::scale_rows(&mut output[block], rescale);
                if self.lane % 4 == 0 {
                    let place = offset_places::<M>(block, self.lane);
                    shared::store_f32(place[0], rows[block].offset[0]);
                    shared::store_f32(place[1], rows[block].offset[1]);
                }
                // Nothing else reads it here.
                rows[block].offset = [0.0; 2];
            },
        );
        warp::sync();
    }

    /// The offsets of the thread's rows. They would take registers all through the tiles.
    #[inline(always)]
    unsafe fn offsets(&self) -> [[f32; 2]; WARP_BLOCKS] {
        [0, 1].map(
            #[inline(always)]
            |block| offset_places::<M>(block, self.lane).map(|place| shared::load_f32(place)),
        )
    }

    /// The keys of a tile, which is the next one.
    #[inline(always)]
    unsafe fn next_keys(&mut self, tile: u32) -> Keys {
        Keys { tile, keys: Matrices::by_columns(self.next(2 * tile), M::IMAGE, self.lane) }
    }

    /// Waits for the next step. Returns the address of its tile.
    #[inline(always)]
    unsafe fn next(&mut self, step: u32) -> u32 {
        self.ring.wait();
        thread::sync_block();
        self.ring.take(step)
    }

    /// S of a tile.
    #[inline(always)]
    unsafe fn scores(&self, at: Keys) -> Scores<M> {
        let mut scores = [<M::Attention as Products>::Scores::splat(0.0); WARP_BLOCKS];
        M::Attention::add_scores(&mut scores, self.queries.opaque(), at.keys);
        scores
    }
}

/// Where the offsets of the thread's rows lie, of a block.
#[inline(always)]
fn offset_places<M: Ampere>(block: usize, lane: u32) -> [u32; 2] {
    fragment::thread_rows(thread::index() / 32 * WARP_ROWS + 16 * block as u32, lane)
        .map(|row| shared::address(Map::<M>::SHARED.seen, row) + 12)
}

/// [`Rows::start_plain`] for the rows of a warp.
#[inline(always)]
unsafe fn start_plain<M: Ampere>(rows: &mut [Rows; WARP_BLOCKS], scores: &mut Scores<M>) -> bool {
    let sums = weigh::<M>(scores);
    if warp::any(!(softmax::may_start_plain::<M::Element>(sums[0]) & softmax::may_start_plain::<M::Element>(sums[1]))) {
        return false;
    }
    *rows = sums.map(Rows::plain);
    true
}

/// [`Rows::absorb`] for the rows of a warp.
#[inline(always)]
unsafe fn absorb<M: Ampere>(rows: &mut [Rows; WARP_BLOCKS], scores: &mut Scores<M>) -> bool {
    let sums = weigh::<M>(scores);
    if warp::any(!(softmax::fits::<M::Element>(sums[0]) & softmax::fits::<M::Element>(sums[1]))) {
        return false;
    }
    each_block(
        #[inline(always)]
        |block| rows[block].take(sums[block]),
    );
    true
}

/// Rounded weights, which stand where the scores were.
#[inline(always)]
fn weights<M: Ampere>(scores: &Scores<M>) -> Weights<M> {
    [M::Attention::weights(&scores[0]), M::Attention::weights(&scores[1])]
}

/// Turns scores into weights. Returns the sums of each block's two rows.
#[inline(always)]
fn weigh<M: Ampere>(scores: &mut Scores<M>) -> [[f32; 2]; WARP_BLOCKS] {
    [softmax::weigh(&mut scores[0]), softmax::weigh(&mut scores[1])]
}
