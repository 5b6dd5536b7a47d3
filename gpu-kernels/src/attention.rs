//! **attention**: O = softmax(scale Q K^T) V over the visible pairs of each head.
//!
//! A block is one producer warpgroup, which copies tiles into shared memory, and `query_rows / 64` consumer warpgroups, each with
//! 64 rows of the query tile (the structure of FlashAttention-3, section 3). Blocks are persistent and take the next query tile when
//! they are done with one; those with text, which see every key, go first. For each query tile a consumer does:
//!
//! ```text
//! from the first tile j (the middle one, see `KeyTiles`), and again from a tile whose weights are too large for the rows' offsets:
//!     S = Q K[j]^T;  lower the offsets, unless rows may do without;  rescale O;  P = weights of S
//!     for each tile j after it:
//!         start S = offsets + Q K[j]^T
//!         start O += P V[j-1]
//!         wait for S;  S = weights of S                       (while O += P V runs on the tensor cores)
//!         wait for O;  P = S
//! O += P V of the last tile;  O / sum -> the model's order
//! ```

use crate::cuda::barrier::{self, Barrier, Slot};
use crate::cuda::mma::{Descriptor, Fragment, TileProducts};
use crate::cuda::{copy, global, math, shared, thread, warp};
use crate::element::Element;
use crate::shape::Shape;
use crate::softmax::{self, Rows};
use framestride_shapes::launch::AttentionParams;
use framestride_shapes::layout::{HeadType, KeyTiles};

/// Registers of a thread, of producer and consumer, with two and with three consumer warpgroups: together what a block of so many
/// threads starts with.
const REGISTERS_OF_2: [u32; 2] = [24, 240];
const REGISTERS_OF_3: [u32; 2] = [32, 160];

type ElementOf<T> = <<T as Shape>::Attention as TileProducts>::Element;

/// Where tiles and barriers lie in shared memory.
struct Plan<T>(core::marker::PhantomData<T>);

impl<T: Shape> Plan<T> {
    const STAGES: u32 = T::TILES.stages;
    const CONSUMERS: u32 = T::TILES.consumers();
    /// The rows of one consumer warpgroup.
    const QUERY_BYTES: u32 = 64 * T::HEAD_DIM * 2;
    const KEY_BYTES: u32 = T::TILES.key_rows * T::HEAD_DIM * 2;

    fn query(warpgroup: u32) -> u32 {
        shared::base() + 1024 + warpgroup * Self::QUERY_BYTES
    }
    fn key(stage: u32) -> u32 {
        Self::query(Self::CONSUMERS) + stage * Self::KEY_BYTES
    }
    fn value(stage: u32) -> u32 {
        Self::key(Self::STAGES + stage)
    }
    fn key_image(slot: Slot) -> Descriptor {
        Descriptor::image(Self::key(slot.stage), T::HEAD_DIM)
    }
    fn value_image(slot: Slot) -> Descriptor {
        Descriptor::image(Self::value(slot.stage), T::HEAD_DIM)
    }
    // A warpgroup's rows are loaded once it is done with the last, so that one may be ahead of the others.
    fn query_full(warpgroup: u32) -> Barrier {
        Barrier::at(warpgroup)
    }
    fn query_free(warpgroup: u32) -> Barrier {
        Barrier::at(Self::CONSUMERS + warpgroup)
    }
    /// Where a warpgroup finds, with its rows, the number of their query tile.
    fn work(warpgroup: u32) -> u32 {
        shared::base() + 512 + 4 * warpgroup
    }
    fn key_full(stage: u32) -> Barrier {
        Barrier::at(2 * Self::CONSUMERS + stage)
    }
    fn key_free(stage: u32) -> Barrier {
        Barrier::at(2 * Self::CONSUMERS + Self::STAGES + stage)
    }
    fn value_full(stage: u32) -> Barrier {
        Barrier::at(2 * (Self::CONSUMERS + Self::STAGES) + stage)
    }
    fn value_free(stage: u32) -> Barrier {
        Barrier::at(2 * (Self::CONSUMERS + Self::STAGES) + Self::STAGES + stage)
    }
}

/// One query tile of one head.
struct Work {
    /// Over batch x heads.
    head: u32,
    head_type: HeadType,
    valid_text: u32,
    /// Packed row of its first query.
    first_row: u32,
    keys: KeyTiles,
}

impl Work {
    /// Query tiles of a head.
    const fn tiles<T: Shape>() -> u32 {
        T::LAYOUT.sequence().div_ceil(T::TILES.query_rows)
    }

    /// All query tiles of a launch.
    #[inline(always)]
    fn count<T: Shape>(params: &AttentionParams) -> u32 {
        Self::tiles::<T>() * params.batch * params.heads
    }

    /// Query tile `index`: those with text first, since they read the most; otherwise neighbours of one head follow each other,
    /// so that the tiles in flight share keys in the L2 cache.
    #[inline(always)]
    unsafe fn at<T: Shape>(params: &AttentionParams, index: u32) -> Work {
        let text_tiles = T::LAYOUT.text_tokens.div_ceil(T::TILES.query_rows);
        let video_tiles = Self::tiles::<T>() - text_tiles;
        let with_text = text_tiles * params.batch * params.heads;
        let (head, tile) = if index < with_text {
            (index / text_tiles.max(1), index % text_tiles.max(1))
        } else {
            ((index - with_text) / video_tiles.max(1), text_tiles + (index - with_text) % video_tiles.max(1))
        };
        let head_type = if params.head_types == 0 {
            HeadType::Dense
        } else {
            HeadType::from_u32(global::load_u32(params.head_types + head as u64 * 4))
        };
        let valid_text = valid_text::<T>(params.text_lengths, head / params.heads);
        let first_row = tile * T::TILES.query_rows;
        let range = T::LAYOUT.range_visible(head_type, first_row, T::TILES.query_rows, valid_text);
        let keys = T::LAYOUT.key_tiles(range, T::TILES.key_rows);
        Work { head, head_type, valid_text, first_row, keys }
    }
}

/// Valid text tokens of a batch item; at most the text there is, whatever memory says.
///
/// # Safety
/// `text_lengths` is 0 or holds a u32 for the item.
#[inline(always)]
pub unsafe fn valid_text<T: Shape>(text_lengths: u64, batch_item: u32) -> u32 {
    if T::LAYOUT.text_tokens == 0 || text_lengths == 0 {
        T::LAYOUT.text_tokens
    } else {
        global::load_u32(text_lengths + batch_item as u64 * 4).min(T::LAYOUT.text_tokens)
    }
}

/// The kernel's body.
///
/// # Safety
/// Launched with the table that `attention_kernels!` wrote for `T`; `params` as its documentation says.
#[inline(always)]
pub unsafe fn attention<T: Shape>(params: &AttentionParams) {
    let thread_warp = thread::warp();
    if thread::index() == 0 {
        let mut warpgroup = 0;
        while warpgroup < Plan::<T>::CONSUMERS {
            Plan::<T>::query_full(warpgroup).init(1);
            Plan::<T>::query_free(warpgroup).init(4);
            warpgroup += 1;
        }
        let mut stage = 0;
        while stage < Plan::<T>::STAGES {
            Plan::<T>::key_full(stage).init(1);
            Plan::<T>::value_full(stage).init(1);
            Plan::<T>::key_free(stage).init(4 * Plan::<T>::CONSUMERS);
            Plan::<T>::value_free(stage).init(4 * Plan::<T>::CONSUMERS);
            stage += 1;
        }
        barrier::publish_initialised();
    }
    thread::sync_block();

    if thread_warp < 4 {
        if T::TILES.consumers() == 2 {
            thread::release_registers::<{ REGISTERS_OF_2[0] }>();
        } else {
            thread::release_registers::<{ REGISTERS_OF_3[0] }>();
        }
        if thread_warp == 0 {
            produce::<T>(params);
        }
    } else {
        if T::TILES.consumers() == 2 {
            thread::take_registers::<{ REGISTERS_OF_2[1] }>();
        } else {
            thread::take_registers::<{ REGISTERS_OF_3[1] }>();
        }
        consume::<T>(params, thread_warp - 4);
    }
}

/// The producer: one warp, whose first lane keeps the stages full. The others go along, so that all it computes is uniform.
#[inline(always)]
unsafe fn produce<T: Shape>(params: &AttentionParams) {
    let is_first_lane = thread::lane() == 0;
    let load = |place: u32, from: u64, bytes: u32, free: Barrier, parity: u32, full: Barrier| {
        free.wait(parity);
        if is_first_lane {
            full.arrive_expecting(bytes);
            copy::to_shared(place, from, bytes, full);
        }
    };
    let mut query_parity = 1;
    let mut slot = Slot::FIRST_FREE;
    let mut index = thread::block_x();
    while index < Work::count::<T>(params) {
        // Asked for early, since the answer takes its time.
        let next = if is_first_lane { thread::blocks_x() + global::add_u32(params.schedule, 1) } else { 0 };
        let work = Work::at::<T>(params, index);
        // Of all heads: memory has fewer than 2^32 rows.
        let first_row = work.head * T::LAYOUT.packed_rows();
        let bytes = |row: u32| (first_row + row) as u64 * (T::HEAD_DIM * 2) as u64;
        let rows = |tile: u32| bytes(work.keys.first_row(tile, T::TILES.key_rows));
        let load_keys = |slot: Slot, tile: u32| {
            let Slot { stage, parity } = slot;
            let (free, full) = (Plan::<T>::key_free(stage), Plan::<T>::key_full(stage));
            load(Plan::<T>::key(stage), params.packed_k + rows(tile), Plan::<T>::KEY_BYTES, free, parity, full);
        };
        let load_values = |slot: Slot, tile: u32| {
            let Slot { stage, parity } = slot;
            let (free, full) = (Plan::<T>::value_free(stage), Plan::<T>::value_full(stage));
            load(Plan::<T>::value(stage), params.packed_v + rows(tile), Plan::<T>::KEY_BYTES, free, parity, full);
        };
        // The place of the first keys is free before the last warpgroup is done with its queries.
        if work.keys.tiles > 0 {
            load_keys(slot, 0);
        }
        let mut warpgroup = 0;
        while warpgroup < Plan::<T>::CONSUMERS {
            let full = Plan::<T>::query_full(warpgroup);
            let queries = params.packed_q + bytes(work.first_row + 64 * warpgroup);
            Plan::<T>::query_free(warpgroup).wait(query_parity);
            if is_first_lane {
                shared::store_u32(Plan::<T>::work(warpgroup), index);
                full.arrive_expecting(Plan::<T>::QUERY_BYTES);
                copy::to_shared(Plan::<T>::query(warpgroup), queries, Plan::<T>::QUERY_BYTES, full);
            }
            warpgroup += 1;
        }
        query_parity ^= 1;
        if work.keys.tiles > 0 {
            load_values(slot, 0);
            let mut tile = 1;
            while tile < work.keys.tiles {
                slot = slot.next(T::TILES.stages);
                load_keys(slot, tile);
                load_values(slot, tile);
                tile += 1;
            }
            slot = slot.next(T::TILES.stages);
        }
        index = warp::broadcast(next, 0);
    }
    // No query tile has this number.
    let mut warpgroup = 0;
    while warpgroup < Plan::<T>::CONSUMERS {
        Plan::<T>::query_free(warpgroup).wait(query_parity);
        if is_first_lane {
            shared::store_u32(Plan::<T>::work(warpgroup), index);
            Plan::<T>::query_full(warpgroup).arrive();
        }
        warpgroup += 1;
    }
    // The last block to be done leaves the schedule as it was.
    if is_first_lane && global::add_u32(params.schedule + 4, 1) == thread::blocks_x() - 1 {
        global::store_u32(params.schedule, 0);
        global::store_u32(params.schedule + 4, 0);
    }
}

/// A consumer warpgroup: 64 rows of each query tile. `consumer_warp` counts over all consumer warps.
#[inline(always)]
unsafe fn consume<T: Shape>(params: &AttentionParams, consumer_warp: u32) {
    let lane = thread::lane();
    let warpgroup = consumer_warp / 4;
    let query = Descriptor::image(Plan::<T>::query(warpgroup), T::HEAD_DIM);
    let mut consumer = Consumer { lane, warpgroup, query, slot: Slot::FIRST_FULL };
    let mut query_parity = 0;
    loop {
        Plan::<T>::query_full(warpgroup).wait(query_parity);
        query_parity ^= 1;
        // Read by the lane that will say that its place is free.
        let index = if lane == 0 { shared::load_u32(Plan::<T>::work(warpgroup)) } else { 0 };
        let index = warp::broadcast(index, 0);
        if index >= Work::count::<T>(params) {
            break;
        }
        let work = Work::at::<T>(params, index);
        let keys = KeyTiles {
            prefix_tiles: warp::uniform(work.keys.prefix_tiles),
            body_start: warp::uniform(work.keys.body_start),
            tiles: warp::uniform(work.keys.tiles),
        };
        // Rows of this warp, and of this thread.
        let warp_row = work.first_row + consumer_warp * 16;
        let thread_rows = [warp_row + lane / 4, warp_row + lane / 4 + 8];
        let mut rows = Rows::new();
        let mut output = <T::Attention as TileProducts>::Output::splat(0.0);
        if keys.tiles > 0 {
            let range = T::LAYOUT.range_visible(work.head_type, warp_row, 16, work.valid_text);
            let visible = thread_rows.map(|row| T::LAYOUT.visible(work.head_type, row, work.valid_text));
            let mask = |scores: &mut <T::Attention as TileProducts>::Scores, tile: u32| {
                let first = keys.first_row(tile, T::TILES.key_rows);
                if !range.sees_all(first, T::TILES.key_rows) {
                    let seen = softmax::seen_keys(first, T::TILES.key_rows, lane, visible);
                    softmax::replace_unseen(scores, seen, f32::NEG_INFINITY);
                }
            };
            consumer.sweep::<T>(keys.tiles, mask, &mut rows, &mut output);
        } else {
            Plan::<T>::query_free(warpgroup).release(lane);
        }
        store::<T>(params, &work, &mut output, &rows, thread_rows, lane);
    }
}

/// Where a consumer warpgroup is.
struct Consumer {
    lane: u32,
    warpgroup: u32,
    /// Its query rows.
    query: Descriptor,
    /// The key tile that it is at.
    slot: Slot,
}

impl Consumer {
    /// Goes over the key tiles of a query tile from `slot` to behind the last: takes all weights into `rows`, and their products with V into
    /// `output`.
    #[inline(always)]
    unsafe fn sweep<T: Shape>(
        &mut self,
        tiles: u32,
        mask: impl Fn(&mut <T::Attention as TileProducts>::Scores, u32),
        rows: &mut Rows,
        output: &mut <T::Attention as TileProducts>::Output,
    ) {
        let mut tile = 0;
        let mut scores = self.first_scores::<T>();
        mask(&mut scores, tile);
        if rows.start_plain::<ElementOf<T>>(&mut scores, self.warpgroup)
            && self.rounds::<T, false>(&mut tile, tiles, &mask, &mut scores, rows, output)
        {
            return;
        }
        loop {
            scores = self.first_scores::<T>();
            mask(&mut scores, tile);
            softmax::scale_rows(output, rows.lower::<ElementOf<T>>(&mut scores));
            if self.rounds::<T, true>(&mut tile, tiles, &mask, &mut scores, rows, output) {
                return;
            }
        }
    }

    /// The rounds of [`Consumer::sweep`], from the weights of `tile` on, with the rows' offsets or (`OFFSETS` is false) with none. False
    /// at a tile whose weights are too large, where `tile` and `slot` are then.
    #[inline(always)]
    unsafe fn rounds<T: Shape, const OFFSETS: bool>(
        &mut self,
        tile: &mut u32,
        tiles: u32,
        mask: &impl Fn(&mut <T::Attention as TileProducts>::Scores, u32),
        scores: &mut <T::Attention as TileProducts>::Scores,
        rows: &mut Rows,
        output: &mut <T::Attention as TileProducts>::Output,
    ) -> bool {
        loop {
            Plan::<T>::key_free(self.slot.stage).release(self.lane);
            Plan::<T>::value_full(self.slot.stage).wait(self.slot.parity);
            let mut weights = T::Attention::weights(scores);
            let last = self.slot;
            self.slot = last.next(T::TILES.stages);
            *tile += 1;
            if *tile == tiles {
                Plan::<T>::query_free(self.warpgroup).release(self.lane);
                T::Attention::start_output(output, &weights, Plan::<T>::value_image(last));
                T::Attention::wait_output(output, &mut weights);
                Plan::<T>::value_free(last.stage).release(self.lane);
                return true;
            }
            Plan::<T>::key_full(self.slot.stage).wait(self.slot.parity);
            rows.put_offsets::<OFFSETS>(scores);
            T::Attention::start_scores(scores, self.query, Plan::<T>::key_image(self.slot));
            T::Attention::start_output(output, &weights, Plan::<T>::value_image(last));
            scores.wait::<1>();
            mask(scores, *tile);
            let fits = rows.absorb::<ElementOf<T>>(scores, self.warpgroup);
            T::Attention::wait_output(output, &mut weights);
            Plan::<T>::value_free(last.stage).release(self.lane);
            if !fits {
                return false;
            }
        }
    }

    /// S of the tile at `slot`, which may have been waited for before.
    #[inline(always)]
    unsafe fn first_scores<T: Shape>(&self) -> <T::Attention as TileProducts>::Scores {
        let mut scores = <T::Attention as TileProducts>::Scores::splat(0.0);
        Plan::<T>::key_full(self.slot.stage).wait(self.slot.parity);
        T::Attention::start_scores(&mut scores, self.query, Plan::<T>::key_image(self.slot));
        scores.wait::<0>();
        scores
    }
}

/// Writes the thread's two rows, divided by their sums, to the model's order.
#[inline(always)]
unsafe fn store<T: Shape>(
    params: &AttentionParams,
    work: &Work,
    output: &mut <T::Attention as TileProducts>::Output,
    rows: &Rows,
    thread_rows: [u32; 2],
    lane: u32,
) {
    // What depends on the lane alone is for here, not for registers all through the tiles.
    let lane = math::opaque(lane);
    let seen_end = work.valid_text + T::LAYOUT.video_tokens();
    let (item, head) = (work.head / params.heads, work.head % params.heads);
    let total = rows.total();
    let mut address = [0u64; 2];
    let mut factor = [0.0f32; 2];
    let mut row = 0;
    while row < 2 {
        let packed = thread_rows[row];
        if packed < T::LAYOUT.sequence() {
            let model_row = T::LAYOUT.query_order().model_row(work.head_type, packed, work.valid_text);
            let out = &params.out;
            address[row] = out.data
                + (item as u64 * out.batch + model_row as u64 * out.row + head as u64 * out.head) * 2
                + (lane % 4 * 16) as u64;
            let live = packed < seen_end;
            if live {
                factor[row] = math::reciprocal(total[row]);
            }
            if params.lse != 0 && lane % 4 == 0 {
                let lse = (math::log2(total[row]) - rows.offset[row]) * core::f32::consts::LN_2;
                let lse = if live { lse } else { f32::NEG_INFINITY };
                global::store_f32(
                    params.lse + (work.head as u64 * T::LAYOUT.sequence() as u64 + model_row as u64) * 4,
                    lse,
                );
            }
        }
        row += 1;
    }
    // Four groups of 8 columns at a time: lane q of a quad holds columns 2 q, 2 q + 1 of each group; after transposing the quad
    // it holds all 8 columns of group q, 16 bytes.
    let mut pairs = [[0u32; 4]; 2];
    output.for_each_group(
        #[inline(always)]
        |group, values| {
            let [a, b, c, d] = values.map(|value| *value);
            // A row of invalid text is zero whatever it summed; 0 x NaN would not be.
            let scaled = |x: f32, row: usize| if factor[row] == 0.0 { 0.0 } else { x * factor[row] };
            let slot = (group % 4) as usize;
            pairs[0][slot] = <T::Attention as TileProducts>::Element::pack(scaled(a, 0), scaled(b, 0));
            pairs[1][slot] = <T::Attention as TileProducts>::Element::pack(scaled(c, 1), scaled(d, 1));
            if slot == 3 {
                let offset = (group / 4 * 64) as u64;
                store_chunk(address[0], offset, transpose_quad(pairs[0], lane), params.aligned);
                store_chunk(address[1], offset, transpose_quad(pairs[1], lane), params.aligned);
            }
        },
    );
}

/// Stores 16 bytes of a row; a row that does not exist has address 0.
#[inline(always)]
unsafe fn store_chunk(address: u64, offset: u64, chunk: [u32; 4], aligned: u32) {
    if address != 0 {
        if aligned != 0 {
            global::store16(address + offset, chunk);
        } else {
            global::store16_unaligned(address + offset, chunk);
        }
    }
}

/// Lane q of each quad gives value g to lane g and gets, as value q', what lane q' held as value q.
#[inline(always)]
unsafe fn transpose_quad(mut x: [u32; 4], lane: u32) -> [u32; 4] {
    // Two butterfly rounds: across bit 1, then bit 0, of lane and index.
    let high = lane & 2 != 0;
    let (a, b) = if high { (x[0], x[1]) } else { (x[2], x[3]) };
    let (a, b) = (warp::exchange(a, 2), warp::exchange(b, 2));
    if high {
        (x[0], x[1]) = (a, b);
    } else {
        (x[2], x[3]) = (a, b);
    }
    let odd = lane & 1 != 0;
    let (a, b) = if odd { (x[0], x[2]) } else { (x[1], x[3]) };
    let (a, b) = (warp::exchange(a, 1), warp::exchange(b, 1));
    if odd {
        (x[0], x[2]) = (a, b);
    } else {
        (x[1], x[3]) = (a, b);
    }
    x
}
