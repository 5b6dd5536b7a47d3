//! The body of **attention** for GPUs since Ampere. Every warp takes part in the copies
//! (`cp.async`), and has 32 rows of the query tile, which it multiplies with `mma.sync`.
//!
//! Each warp decides alone whether its rows have offsets. There is one loop for both, so that all
//! warps wait at the same barriers.
//!
//! Where shared memory has room for a fourth slot, the values of a tile come with the keys of the
//! next one, at one barrier. Where there are registers, a warp holds its queries in them.

use core::marker::PhantomData;

use super::order;
use super::store::{Sums, store};
use super::work::Work;
use crate::cuda::mma::{Fragment, Matrices, Products, WarpProducts, WarpScores};
use crate::cuda::{copy, math, shared, thread, warp};
use crate::masks::Mask;
use crate::masks::band::Band;
use crate::model::{Ampere, Model};
use crate::ring::{Ring, RingShape, copy_rows};
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::{WARP_BLOCKS, WARP_ROWS};
use framestride_shapes::fragment;
use framestride_shapes::layout::{RangeVisible, Visible};
use framestride_shapes::params::AttentionParams;
use framestride_shapes::shared::WarpAttentionShared;

type Scores<M> = [<<M as Model>::Attention as Products>::Scores; WARP_BLOCKS];
type Weights<M> = [<<M as Model>::Attention as Products>::Weights; WARP_BLOCKS];
type Output<M> = [<<M as Model>::Attention as Products>::Output; WARP_BLOCKS];
type Queries<M> = <<M as Model>::Attention as WarpScores<WARP_BLOCKS>>::Queries;

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
    /// All warps copy.
    const RING: RingShape = RingShape::new(M::IMAGE, M::TILES.key_rows, M::TILES.stages, Self::THREADS / 32);
    /// Whether keys come with the values of the tile before, at one barrier. With three slots each
    /// has a barrier.
    const KEYS_WITH_VALUES: bool = M::TILES.stages == 4;
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
            // What follows from it is found anew for each query tile, and takes no registers before.
            let own_warp = math::opaque(own_warp);
            let warp_sees = mask.warp(warp_row, WARP_ROWS);
            if lane == 0 {
                let RangeVisible { prefix, all_start, all_end, .. } = warp_sees;
                shared::store16(shared::address(memory.warp_seen, own_warp), [prefix, all_start, all_end, 0]);
            }
            let hide = |scores: &mut Scores<M>, first: u32| {
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
            let packed = [params.packed_k, params.packed_v];
            let ring = Ring::new(Map::<M>::RING, packed, head_row, memory.ring, own_warp, lane);
            let first = mask.first_key(0);
            ring.copy_keys(first, ring.first_slot(0));
            copy::commit_group();
            ring.copy_values(first, ring.first_slot(1));
            copy::commit_group();
            // The queries and the first keys are there.
            copy::wait_groups::<1>();
            thread::sync_block();
            let slots = shared::address(memory.ring, 0);
            let own_query = query + M::IMAGE.bytes(WARP_ROWS) * own_warp;
            let mut warp = Warp {
                lane,
                queries: M::Attention::queries(Matrices::by_rows(own_query, M::IMAGE, 0, lane)),
                keys: Matrices::by_columns(slots, M::IMAGE, lane).opaque(),
                values: Matrices::by_rows(slots, M::IMAGE, 0, lane).opaque(),
                ring,
                first,
                tiles: mask.tiles(),
                next_key: |first| mask.next_key(first),
                model: PhantomData::<M>,
            };
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
struct Warp<M: Ampere, F> {
    lane: u32,
    queries: Queries<M>,
    /// Keys and values in the first slot.
    keys: Matrices,
    values: Matrices,
    ring: Ring,
    /// First row of the next tile, or of the last one.
    first: u32,
    /// How many tiles there are, from the next on.
    tiles: u32,
    /// First row of the tile behind another.
    next_key: F,
    model: PhantomData<M>,
}

/// The keys of a tile, and its first row.
#[derive(Clone, Copy)]
struct Keys {
    first: u32,
    keys: Matrices,
}

impl<M: Ampere, F: Fn(u32) -> u32> Warp<M, F> {
    /// Goes over the key tiles of a query tile. It takes all weights into `rows`, and their
    /// products with V into `output`. `hide` sets the scores of unseen keys to -inf, of the tile
    /// that begins at a row.
    #[inline(always)]
    unsafe fn sweep(
        &mut self,
        hide: impl Fn(&mut Scores<M>, u32),
        rows: &mut [Rows; WARP_BLOCKS],
        output: &mut Output<M>,
    ) {
        let mut at = self.take_keys();
        let mut scores = self.scores(at);
        hide(&mut scores, at.first);
        let mut has_offsets = !start_plain::<M>(rows, &mut scores);
        if has_offsets {
            self.lower([[softmax::NOTHING_SEEN; 2]; WARP_BLOCKS], at, &hide, &mut scores, rows, output);
        }
        loop {
            // These wait for the values, since they take half as many registers as the scores.
            let weights = weights::<M>(&scores);
            let values = self.next_values();
            M::Attention::add_output(output, &weights, values);
            if self.tiles == 0 {
                return;
            }
            if !Map::<M>::KEYS_WITH_VALUES {
                self.wait();
            }
            at = self.take_keys();
            scores = self.scores(at);
            hide(&mut scores, at.first);
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
        hide(scores, at.first);
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

    /// Waits until what the next steps read is there, in all warps.
    #[inline(always)]
    unsafe fn wait(&self) {
        if Map::<M>::KEYS_WITH_VALUES {
            copy::wait_groups::<0>();
        } else {
            copy::wait_groups::<1>();
        }
        thread::sync_block();
    }

    /// The keys of the next tile, which are there. Behind them the keys after those are copied.
    #[inline(always)]
    unsafe fn take_keys(&mut self) -> Keys {
        let (slots, first) = (self.ring.begin(), self.first);
        self.tiles -= 1;
        if self.tiles > 0 {
            self.first = (self.next_key)(first);
            self.ring.copy_keys(self.first, slots.later);
        }
        copy::commit_group();
        Keys { first, keys: self.keys.behind(slots.own) }
    }

    /// The values of the same tile.
    #[inline(always)]
    unsafe fn next_values(&mut self) -> Matrices {
        self.wait();
        let slots = self.ring.begin();
        if self.tiles > 0 {
            self.ring.copy_values(self.first, slots.later);
        }
        copy::commit_group();
        self.values.behind(slots.own)
    }

    /// S of a tile.
    #[inline(always)]
    unsafe fn scores(&self, at: Keys) -> Scores<M> {
        let mut scores = [<M::Attention as Products>::Scores::splat(0.0); WARP_BLOCKS];
        M::Attention::add_scores(&mut scores, self.queries, at.keys);
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
