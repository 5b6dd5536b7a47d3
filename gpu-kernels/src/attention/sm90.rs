//! The body of **attention** for Hopper. A producer warp asks for bulk copies, and consumer
//! warpgroups multiply with `wgmma`.

mod anchors;
mod e4m3;

use super::order;
use super::store::{Sums, store};
use super::work::Work;
use crate::cuda::barrier::{self, Barrier, Slot};
use crate::cuda::mma::{Descriptor, Fragment, Products, TileProducts};
use crate::cuda::{copy, shared, thread, warp};
use crate::masks::Mask;
use crate::masks::band::Band;
use crate::model::{Hopper, HopperE4m3};
use crate::softmax::{self, Rows};
use framestride_shapes::blocks::WARPGROUP_ROWS;
use framestride_shapes::fragment;
use framestride_shapes::image::ATOM_ROWS;
use framestride_shapes::params::AttentionParams;
use framestride_shapes::shared::{Barriers, Parts};

/// Registers of a thread of producer and consumer, with two and with three consumer warpgroups.
/// Together they are what a block of so many threads starts with.
const REGISTERS_OF_2: [u32; 2] = [24, 240];
const REGISTERS_OF_3: [u32; 2] = [32, 160];

/// The kernel's body.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, and `params` is as its
/// documentation says.
#[inline(always)]
pub unsafe fn attention<M: Hopper>(params: &AttentionParams) {
    start::<M>(
        params,
        #[inline(always)]
        |consumer_warp| consume::<M>(params, consumer_warp, attend::<M>),
    );
}

/// The kernel's body for attention in 8 bits.
///
/// # Safety
/// As for [`attention`].
#[inline(always)]
pub unsafe fn attention_e4m3<M: HopperE4m3>(params: &AttentionParams) {
    start::<M>(
        params,
        #[inline(always)]
        |consumer_warp| consume::<M>(params, consumer_warp, e4m3::attend::<M>),
    );
}

/// Makes barriers, and gives each warp its part.
#[inline(always)]
unsafe fn start<M: Hopper>(params: &AttentionParams, consume: impl FnOnce(u32)) {
    let memory = M::ATTENTION_SHARED;
    let thread_warp = thread::warp();
    if thread::index() == 0 {
        let mut warpgroup = 0;
        while warpgroup < M::TILES.consumers() {
            Barrier::at(memory.query_full, warpgroup).init(1);
            Barrier::at(memory.query_free, warpgroup).init(4);
            warpgroup += 1;
        }
        let mut stage = 0;
        while stage < M::TILES.stages {
            Barrier::at(memory.key_full, stage).init(1);
            Barrier::at(memory.value_full, stage).init(1);
            Barrier::at(memory.key_free, stage).init(4 * M::TILES.consumers());
            Barrier::at(memory.value_free, stage).init(4 * M::TILES.consumers());
            stage += 1;
        }
        barrier::publish_initialised();
    }
    thread::sync_block();

    if thread_warp < 4 {
        if M::TILES.consumers() == 2 {
            thread::release_registers::<{ REGISTERS_OF_2[0] }>();
        } else {
            thread::release_registers::<{ REGISTERS_OF_3[0] }>();
        }
        if thread_warp == 0 {
            produce::<M>(params);
        }
    } else {
        if M::TILES.consumers() == 2 {
            thread::take_registers::<{ REGISTERS_OF_2[1] }>();
        } else {
            thread::take_registers::<{ REGISTERS_OF_3[1] }>();
        }
        consume(thread_warp - 4);
    }
}

/// A ring of tiles in shared memory that the producer fills and the consumers free.
#[derive(Clone, Copy)]
struct Ring {
    tiles: Parts,
    full: Barriers,
    free: Barriers,
}

/// The producer is one warp, whose first lane keeps the stages full. Its other lanes go along, so
/// that all it computes is uniform.
#[inline(always)]
unsafe fn produce<M: Hopper>(params: &AttentionParams) {
    let memory = M::ATTENTION_SHARED;
    let keys = Ring { tiles: memory.key, full: memory.key_full, free: memory.key_free };
    let values = Ring { tiles: memory.value, full: memory.value_full, free: memory.value_free };
    let is_first_lane = thread::lane() == 0;
    let mut query_parity = 1;
    let mut slot = Slot::FIRST_FREE;
    let mut index = thread::block_x();
    while index < order::count::<M>(params) {
        // This is asked for early, since the answer takes its time.
        let next = if is_first_lane { order::take_next(params) } else { 0 };
        if !M::has_head(params.precisions, order::head_and_tile::<M>(params, index).0) {
            index = warp::broadcast(next, 0);
            continue;
        }
        let work = Work::<M>::at(params, index);
        // Rows are counted over all heads: memory has fewer than 2^32.
        let first_row = work.head * M::image_rows();
        let bytes = |row: u32| (first_row + row) as u64 * M::ROW_BYTES as u64;
        let load = |Ring { tiles, full, free }: Ring, packed: u64, Slot { stage, parity }: Slot, tile: u32| {
            let (free, full) = (Barrier::at(free, stage), Barrier::at(full, stage));
            let (to, from) = (shared::address(tiles, stage), packed + bytes(work.mask.first_key(tile)));
            free.wait(parity);
            if is_first_lane {
                full.arrive_expecting(M::TILES.key_rows * M::ROW_BYTES);
                copy::to_shared(to, from, M::TILES.key_rows * M::ROW_BYTES, full);
            }
        };
        // The place of the first keys is free before the last warpgroup is done with its queries.
        if work.mask.tiles() > 0 {
            load(keys, params.packed_k, slot, 0);
        }
        let mut warpgroup = 0;
        while warpgroup < M::TILES.consumers() {
            let full = Barrier::at(memory.query_full, warpgroup);
            let queries = params.packed_q + bytes(work.first_row + WARPGROUP_ROWS * warpgroup);
            Barrier::at(memory.query_free, warpgroup).wait(query_parity);
            if is_first_lane {
                shared::store_u32(shared::address(memory.work, warpgroup), index);
                full.arrive_expecting(WARPGROUP_ROWS * M::ROW_BYTES);
                let place = shared::address(memory.query, warpgroup);
                copy::to_shared(place, queries, WARPGROUP_ROWS * M::ROW_BYTES, full);
            }
            warpgroup += 1;
        }
        query_parity ^= 1;
        if work.mask.tiles() > 0 {
            load(values, params.packed_v, slot, 0);
            let mut tile = 1;
            while tile < work.mask.tiles() {
                slot = slot.next(M::TILES.stages);
                load(keys, params.packed_k, slot, tile);
                load(values, params.packed_v, slot, tile);
                tile += 1;
            }
            slot = slot.next(M::TILES.stages);
        }
        index = warp::broadcast(next, 0);
    }
    // No query tile has this number, which ends the consumers.
    let mut warpgroup = 0;
    while warpgroup < M::TILES.consumers() {
        Barrier::at(memory.query_free, warpgroup).wait(query_parity);
        if is_first_lane {
            shared::store_u32(shared::address(memory.work, warpgroup), index);
            Barrier::at(memory.query_full, warpgroup).arrive();
        }
        warpgroup += 1;
    }
    if is_first_lane {
        order::leave(params);
    }
}

/// A consumer warpgroup has 64 rows of each query tile. `consumer_warp` counts over the warps of
/// all consumers. `attend` takes a query tile through its key tiles, and writes its output.
#[inline(always)]
unsafe fn consume<M: Hopper>(
    params: &AttentionParams,
    consumer_warp: u32,
    attend: unsafe fn(&AttentionParams, &mut Consumer, &Work<M>, u32),
) {
    let memory = M::ATTENTION_SHARED;
    let lane = thread::lane();
    let warpgroup = consumer_warp / 4;
    let query = Descriptor::image(shared::address(memory.query, warpgroup), ATOM_ROWS * M::ROW_BYTES);
    let mut consumer = Consumer { lane, warpgroup, query, slot: Slot::FIRST_FULL };
    let mut query_parity = 0;
    loop {
        Barrier::at(memory.query_full, warpgroup).wait(query_parity);
        query_parity ^= 1;
        // The lane that will say that its place is free reads it.
        let index = if lane == 0 { shared::load_u32(shared::address(memory.work, warpgroup)) } else { 0 };
        let index = warp::broadcast(index, 0);
        if index >= order::count::<M>(params) {
            break;
        }
        let work = Work::<M>::at(params, index);
        attend(params, &mut consumer, &work, work.first_row + consumer_warp * 16);
    }
}

/// Takes a query tile through its key tiles. `warp_row` is the packed row of the warp's first
/// query.
#[inline(always)]
unsafe fn attend<M: Hopper>(params: &AttentionParams, consumer: &mut Consumer, work: &Work<M>, warp_row: u32) {
    let lane = consumer.lane;
    let mask = work.mask.uniform();
    let thread_rows = fragment::thread_rows(warp_row, lane);
    let mut rows = Rows::new();
    let mut output = <M::Attention as Products>::Output::splat(0.0);
    if mask.tiles() > 0 {
        let (warp_sees, thread_sees) = (mask.warp(warp_row, 16), mask.thread(thread_rows));
        let hide = |scores: &mut <M::Attention as Products>::Scores, tile: u32| {
            let first = mask.first_key(tile);
            if !Band::<M>::sees_all(&warp_sees, first) {
                softmax::replace_unseen(scores, Band::<M>::seen_keys(&thread_sees, first, lane), f32::NEG_INFINITY);
            }
        };
        anchors::clear::<M>();
        consumer.sweep::<M>(mask.tiles(), hide, &mut rows, &mut output);
        anchors::give_back::<M>(&mut output, mask.tiles());
    } else {
        Barrier::at(M::ATTENTION_SHARED.query_free, consumer.warpgroup).release(lane);
    }
    let sums = Sums { offset: rows.offset, total: rows.total() };
    store::<M>(params, work, &mut output, sums, thread_rows, lane, |_, means| means);
}

/// A consumer warpgroup, and where it is.
struct Consumer {
    lane: u32,
    warpgroup: u32,
    /// The place of its query rows.
    query: Descriptor,
    /// The slot of the key tile that it is at.
    slot: Slot,
}

impl Consumer {
    /// Goes over the key tiles of a query tile, from the one in `slot` to the last. It takes all
    /// weights into `rows`, and their products with V into `output`. `mask` sets the scores of
    /// unseen keys of a tile to -inf.
    #[inline(always)]
    unsafe fn sweep<M: Hopper>(
        &mut self,
        tiles: u32,
        mask: impl Fn(&mut <M::Attention as Products>::Scores, u32),
        rows: &mut Rows,
        output: &mut <M::Attention as Products>::Output,
    ) {
        let mut tile = 0;
        let mut scores = self.first_scores::<M>();
        mask(&mut scores, tile);
        if rows.start_plain::<M::Element>(&mut scores, self.warpgroup)
            && self.rounds::<M, false>(&mut tile, tiles, &mask, &mut scores, rows, output)
        {
            return;
        }
        loop {
            if tile != 0 && anchors::are_due(tile) {
                anchors::put::<M>(output, rows);
            }
            scores = self.first_scores::<M>();
            mask(&mut scores, tile);
            let factors = rows.lower::<M::Element>(&mut scores);
            softmax::scale_rows(output, factors);
            anchors::scale::<M>(factors);
            if self.rounds::<M, true>(&mut tile, tiles, &mask, &mut scores, rows, output) {
                return;
            }
        }
    }

    /// The rounds of [`Consumer::sweep`], from the weights of `tile` on, with the rows' offsets or
    /// (`OFFSETS` is false) with none.
    ///
    /// False means that the weights of a tile are too large, or with offsets, that
    /// [`anchors`](anchors::put) are due. `tile` and `slot` are at that tile then.
    #[inline(always)]
    unsafe fn rounds<M: Hopper, const OFFSETS: bool>(
        &mut self,
        tile: &mut u32,
        tiles: u32,
        mask: &impl Fn(&mut <M::Attention as Products>::Scores, u32),
        scores: &mut <M::Attention as Products>::Scores,
        rows: &mut Rows,
        output: &mut <M::Attention as Products>::Output,
    ) -> bool {
        loop {
            Barrier::at(M::ATTENTION_SHARED.key_free, self.slot.stage).release(self.lane);
            Barrier::at(M::ATTENTION_SHARED.value_full, self.slot.stage).wait(self.slot.parity);
            let mut weights = M::Attention::weights(scores);
            let last = self.slot;
            self.slot = last.next(M::TILES.stages);
            *tile += 1;
            // With offsets, the anchors would take registers that the loop has not.
            if *tile == tiles || OFFSETS && anchors::are_due(*tile) {
                if *tile == tiles {
                    Barrier::at(M::ATTENTION_SHARED.query_free, self.warpgroup).release(self.lane);
                }
                M::Attention::start_output(output, &weights, value_image::<M>(last));
                M::Attention::wait_output(output, &mut weights);
                Barrier::at(M::ATTENTION_SHARED.value_free, last.stage).release(self.lane);
                return *tile == tiles;
            }
            Barrier::at(M::ATTENTION_SHARED.key_full, self.slot.stage).wait(self.slot.parity);
            rows.put_offsets::<OFFSETS>(scores);
            M::Attention::start_scores(scores, self.query, key_image::<M>(self.slot));
            if !OFFSETS && anchors::are_due(*tile) {
                anchors::put::<M>(output, rows);
            }
            M::Attention::start_output(output, &weights, value_image::<M>(last));
            M::Attention::wait_scores::<1>(scores);
            mask(scores, *tile);
            let fits = rows.absorb::<M::Element>(scores, self.warpgroup);
            M::Attention::wait_output(output, &mut weights);
            Barrier::at(M::ATTENTION_SHARED.value_free, last.stage).release(self.lane);
            if !fits {
                return false;
            }
        }
    }

    /// S of the tile in `slot`. It may have been waited for before.
    #[inline(always)]
    unsafe fn first_scores<M: Hopper>(&self) -> <M::Attention as Products>::Scores {
        let mut scores = <M::Attention as Products>::Scores::splat(0.0);
        Barrier::at(M::ATTENTION_SHARED.key_full, self.slot.stage).wait(self.slot.parity);
        M::Attention::start_scores(&mut scores, self.query, key_image::<M>(self.slot));
        M::Attention::wait_scores::<0>(&mut scores);
        scores
    }
}

/// The key tile in a slot.
#[inline(always)]
fn key_image<M: Hopper>(slot: Slot) -> Descriptor {
    Descriptor::image(shared::address(M::ATTENTION_SHARED.key, slot.stage), ATOM_ROWS * M::ROW_BYTES)
}

/// The value tile in a slot.
#[inline(always)]
fn value_image<M: Hopper>(slot: Slot) -> Descriptor {
    Descriptor::image(shared::address(M::ATTENTION_SHARED.value, slot.stage), ATOM_ROWS * M::ROW_BYTES)
}
