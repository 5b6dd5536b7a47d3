//! **profile** and **select**: which mask suits each head (Sparse VideoGen, section 4.1).
//!
//! profile: a block takes 64 sampled rows of one head and one split of its key tiles. The weights of a tile are computed once, relative
//! to an offset common to all masks, and multiplied with V three times: as they are (dense), and with what the spatial or the
//! temporal mask hides set to zero. Keys lie in the spatial layout, so the temporal mask is tested by position. A consumer
//! warpgroup has registers for three outputs of 64 columns: with head dim 128 both work on every tile, each on half of V's columns;
//! with head dim 64 they take turns on the tiles, and the first merges in what the second has. Grid: x = splits of the key tiles,
//! y = groups of 64 samples, z = batch x heads.
//!
//! select: merges the splits, and compares both masked outputs with the dense one. Grid: z = batch x heads.

use crate::attention::valid_text;
use crate::cuda::barrier::{self, Barrier, Slot};
use crate::cuda::mma::{ATOM_BYTES, Descriptor, Fragment, TileProducts};
use crate::cuda::{copy, global, math, shared, thread, warp};
use crate::element::Element;
use crate::shape::Shape;
use crate::softmax::{self, Rows};
use framestride_shapes::launch::{
    PROFILE_COLUMNS as COLUMNS, PROFILE_KEY_ROWS as KEY_ROWS, PROFILE_THREADS, ProfileParams, ProfilePlan, SAMPLE_ROWS,
    SELECT_THREADS, SelectParams, profile_stages,
};
use framestride_shapes::layout::{ATOM_ROWS, HeadType, Visible};

const PRODUCER_REGISTERS: u32 = 24;
const CONSUMER_REGISTERS: u32 = 240;
const CONSUMERS: u32 = 2;

/// Where samples, tiles and barriers lie in shared memory, and how a block divides its work.
struct Plan<T>(core::marker::PhantomData<T>);

impl<T: Shape> Plan<T> {
    const STAGES: u32 = profile_stages(T::HEAD_DIM);
    const TILE_BYTES: u32 = KEY_ROWS * T::HEAD_DIM * 2;
    /// Whether the consumer warpgroups take turns on the tiles, instead of sharing the columns of each.
    const TURNS: bool = T::HEAD_DIM == COLUMNS;
    /// Warps that read a tile.
    const READERS: u32 = if Self::TURNS { 4 } else { CONSUMERS * 4 };

    fn query() -> u32 {
        shared::base() + 1024
    }
    fn key(stage: u32) -> u32 {
        Self::query() + SAMPLE_ROWS * T::HEAD_DIM * 2 + 2 * stage * Self::TILE_BYTES
    }
    fn value(stage: u32) -> u32 {
        Self::key(stage) + Self::TILE_BYTES
    }
    fn full(stage: u32) -> Barrier {
        Barrier::at(stage)
    }
    fn free(stage: u32) -> Barrier {
        Barrier::at(Self::STAGES + stage)
    }

    /// Sizes of the partial results, for `splits` parts of the keys of a head.
    #[inline(always)]
    fn partials(splits: u32) -> ProfilePlan {
        let groups = T::PROFILE_ROWS.div_ceil(SAMPLE_ROWS);
        ProfilePlan { rows: T::PROFILE_ROWS, groups, splits, head_dim: T::HEAD_DIM }
    }
}

/// The body of **profile**.
///
/// # Safety
/// Launched with the table that `attention_kernels!` wrote for `T`; `params` as its documentation says.
#[inline(always)]
pub unsafe fn profile<T: Shape>(params: &ProfileParams) {
    let (split, group, head) = (thread::block_x(), thread::block_y(), thread::block_z());
    let thread_warp = thread::warp();
    let valid_text = valid_text::<T>(params.text_lengths, head / params.heads);
    let end = valid_text + T::LAYOUT.video_tokens();
    let tiles = end.div_ceil(KEY_ROWS);
    // Splits that differ by one tile at most.
    let (share, rest) = (tiles / params.splits, tiles % params.splits);
    let first_tile = split * share + split.min(rest);
    let last_tile = first_tile + share + (split < rest) as u32;
    let head_bytes = T::LAYOUT.packed_rows() as u64 * (T::HEAD_DIM * 2) as u64 * head as u64;

    if thread::index() == 0 {
        let mut stage = 0;
        while stage < Plan::<T>::STAGES {
            Plan::<T>::full(stage).init(1);
            Plan::<T>::free(stage).init(Plan::<T>::READERS);
            stage += 1;
        }
        barrier::publish_initialised();
    }
    gather_samples::<T>(params, head, group, valid_text, params.packed_q + head_bytes);
    shared::publish_to_async();
    thread::sync_block();

    if thread_warp < 4 {
        thread::release_registers::<PRODUCER_REGISTERS>();
        if thread::index() == 0 {
            let bytes = Plan::<T>::TILE_BYTES;
            let mut slot = Slot::FIRST_FREE;
            let mut tile = first_tile;
            while tile < last_tile {
                let (stage, rows) = (slot.stage, head_bytes + tile as u64 * bytes as u64);
                Plan::<T>::free(stage).wait(slot.parity);
                Plan::<T>::full(stage).arrive_expecting(2 * bytes);
                copy::to_shared(Plan::<T>::key(stage), params.packed_k + rows, bytes, Plan::<T>::full(stage));
                copy::to_shared(Plan::<T>::value(stage), params.packed_v + rows, bytes, Plan::<T>::full(stage));
                slot = slot.next(Plan::<T>::STAGES);
                tile += 1;
            }
        }
    } else {
        thread::take_registers::<CONSUMER_REGISTERS>();
        consume::<T>(params, thread_warp - 4, [split, group, head], valid_text, first_tile..last_tile);
    }
}

/// A consumer warpgroup: all samples of the block, on its own columns or its own tiles. `consumer_warp` counts over both.
#[inline(always)]
unsafe fn consume<T: Shape>(
    params: &ProfileParams,
    consumer_warp: u32,
    [split, group, head]: [u32; 3],
    valid_text: u32,
    tiles: core::ops::Range<u32>,
) {
    let lane = thread::lane();
    let warpgroup = consumer_warp / 4;
    let (turn, columns) = if Plan::<T>::TURNS { (warpgroup, 0) } else { (0, warpgroup) };
    let samples = [consumer_warp % 4 * 16 + lane / 4, consumer_warp % 4 * 16 + lane / 4 + 8];
    let masks = Masks::new::<T>(samples.map(|sample| sampled_row::<T>(params, head, group, sample)), valid_text, lane);
    let query = Descriptor::image(Plan::<T>::query(), T::HEAD_DIM);
    let key = |slot: Slot| Descriptor::image(Plan::<T>::key(slot.stage), T::HEAD_DIM);
    let value = |slot: Slot| Descriptor::image(Plan::<T>::value(slot.stage) + columns * ATOM_BYTES, T::HEAD_DIM);
    let next = |slot: Slot| {
        let slot = slot.next(Plan::<T>::STAGES);
        if Plan::<T>::TURNS { slot.next(Plan::<T>::STAGES) } else { slot }
    };

    let mut rows = Rows::new();
    let mut sums = [[0.0f32; 2]; 2];
    let mut outputs = [<T::Profile as TileProducts>::Output::splat(0.0); 3];
    let headroom = <T::Profile as TileProducts>::Element::HEADROOM;
    let mut slot = if turn == 0 { Slot::FIRST_FULL } else { Slot::FIRST_FULL.next(Plan::<T>::STAGES) };
    let mut tile = tiles.start + turn;
    if tile < tiles.end {
        Plan::<T>::full(slot.stage).wait(slot.parity);
        let mut scores = <T::Profile as TileProducts>::Scores::splat(0.0);
        let mut weights;
        'offsets: loop {
            T::Profile::start_scores(&mut scores, query, key(slot));
            scores.wait::<0>();
            masks.hide_beyond_end::<T>(&mut scores, tile * KEY_ROWS);
            let rescale = rows.lower(&mut scores, headroom);
            let [dense, spatial, temporal] = &mut outputs;
            softmax::scale_rows(dense, rescale);
            softmax::scale_rows(spatial, rescale);
            softmax::scale_rows(temporal, rescale);
            sums = sums.map(|sum| [sum[0] * rescale[0], sum[1] * rescale[1]]);
            weights = masks.weights::<T>(&scores, tile * KEY_ROWS, &mut sums);
            loop {
                tile += if Plan::<T>::TURNS { CONSUMERS } else { 1 };
                if tile >= tiles.end {
                    break 'offsets;
                }
                let last = slot;
                slot = next(slot);
                Plan::<T>::full(slot.stage).wait(slot.parity);
                T::Profile::start_scores(&mut scores, query, key(slot));
                start_outputs::<T>(&mut outputs, &weights, value(last));
                scores.wait::<3>();
                masks.hide_beyond_end::<T>(&mut scores, tile * KEY_ROWS);
                let fits = rows.absorb(&mut scores, warpgroup);
                wait_outputs::<T>(&mut outputs, &mut weights);
                Plan::<T>::free(last.stage).release(lane);
                if !fits {
                    break;
                }
                weights = masks.weights::<T>(&scores, tile * KEY_ROWS, &mut sums);
            }
        }
        start_outputs::<T>(&mut outputs, &weights, value(slot));
        wait_outputs::<T>(&mut outputs, &mut weights);
    }

    if Plan::<T>::TURNS {
        merge_turns::<T>(warpgroup, &mut rows, &mut sums, &mut outputs);
        if warpgroup > 0 {
            return;
        }
    }
    let plan = Plan::<T>::partials(params.splits);
    let partial = params.partials + plan.offset(head, group, split) * 4;
    let [dense, spatial, temporal] = &mut outputs;
    if lane % 4 == 0 && columns == 0 {
        let mut row = 0;
        while row < 2 {
            global::store_f32(partial + samples[row] as u64 * 4, -rows.offset[row]);
            row += 1;
        }
    }
    let place = |mask: u32| partial + plan.mask_offset(mask) as u64 * 4;
    store_mask::<T>(place(0), samples, rows.sum, dense, lane, columns);
    store_mask::<T>(place(1), samples, sums[0], spatial, lane, columns);
    store_mask::<T>(place(2), samples, sums[1], temporal, lane, columns);
}

/// Gives the first warpgroup the results of both. They have had different tiles, and so have different offsets.
#[inline(always)]
unsafe fn merge_turns<T: Shape>(
    warpgroup: u32,
    rows: &mut Rows,
    sums: &mut [[f32; 2]; 2],
    [dense, spatial, temporal]: &mut [<T::Profile as TileProducts>::Output; 3],
) {
    const PER_OUTPUT: u32 = COLUMNS / 2;
    // Where tiles were: a value of one thread lies beside that of the next.
    let place = |index: u32| Plan::<T>::key(0) + (index * 128 + thread::index() % 128) * 4;
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
        spatial.for_each(
            #[inline(always)]
            |i, value| shared::store_f32(place(8 + PER_OUTPUT + i), *value),
        );
        temporal.for_each(
            #[inline(always)]
            |i, value| shared::store_f32(place(8 + 2 * PER_OUTPUT + i), *value),
        );
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
            |i, value| *value = add(*value, softmax::row_of(i), 8 + i),
        );
        spatial.for_each(
            #[inline(always)]
            |i, value| *value = add(*value, softmax::row_of(i), 8 + PER_OUTPUT + i),
        );
        temporal.for_each(
            #[inline(always)]
            |i, value| *value = add(*value, softmax::row_of(i), 8 + 2 * PER_OUTPUT + i),
        );
    }
}

/// The three products with V, a group each.
#[inline(always)]
unsafe fn start_outputs<T: Shape>(
    [dense, spatial, temporal]: &mut [<T::Profile as TileProducts>::Output; 3],
    weights: &[<T::Profile as TileProducts>::Weights; 3],
    value: Descriptor,
) {
    T::Profile::start_output(dense, &weights[0], value);
    T::Profile::start_output(spatial, &weights[1], value);
    T::Profile::start_output(temporal, &weights[2], value);
}

/// Waits for all products.
#[inline(always)]
unsafe fn wait_outputs<T: Shape>(
    [dense, spatial, temporal]: &mut [<T::Profile as TileProducts>::Output; 3],
    weights: &mut [<T::Profile as TileProducts>::Weights; 3],
) {
    T::Profile::wait_output(dense, &mut weights[0]);
    T::Profile::wait_output(spatial, &mut weights[1]);
    T::Profile::wait_output(temporal, &mut weights[2]);
}

/// Video row, frame-major, of a sample; samples beyond the last repeat it.
#[inline(always)]
fn sampled_row<T: Shape>(params: &ProfileParams, head: u32, group: u32, sample: u32) -> u32 {
    let index = (group * SAMPLE_ROWS + sample).min(T::PROFILE_ROWS - 1);
    T::LAYOUT.sampled_video_row(params.seed, head, index, T::PROFILE_ROWS)
}

/// Copies the sampled rows of packed Q into the image of a query tile. All threads of the block take part.
#[inline(always)]
unsafe fn gather_samples<T: Shape>(params: &ProfileParams, head: u32, group: u32, valid_text: u32, packed_q: u64) {
    let blocks = T::HEAD_DIM / 64;
    let mut chunk = thread::index();
    while chunk < SAMPLE_ROWS * T::HEAD_DIM / 8 {
        let (sample, column) = (chunk / (T::HEAD_DIM / 8), chunk % (T::HEAD_DIM / 8));
        let row = valid_text + sampled_row::<T>(params, head, group, sample);
        let place = |row: u32| {
            let atom = row / ATOM_ROWS * blocks + column / 8;
            atom as u64 * 1024 + (row % ATOM_ROWS * 128 + (column % 8 ^ row % ATOM_ROWS) * 16) as u64
        };
        shared::store16(Plan::<T>::query() + place(sample) as u32, global::load16(packed_q + place(row)));
        chunk += PROFILE_THREADS;
    }
}

/// What the thread's two samples see of a tile of the spatial layout.
struct Masks {
    lane: u32,
    valid_text: u32,
    /// Through the spatial mask.
    spatial: [Visible; 2],
    /// Added to a key's position in the temporal layout, it gives a number below `2 half_width - 1` where the temporal mask shows
    /// the key: `|position(query) - position(key)| < half_width`.
    temporal: [u32; 2],
}

impl Masks {
    /// For two video rows, frame-major.
    #[inline(always)]
    fn new<T: Shape>(videos: [u32; 2], valid_text: u32, lane: u32) -> Masks {
        let half_width = T::LAYOUT.half_width(HeadType::Temporal);
        Masks {
            lane,
            valid_text,
            spatial: videos.map(|video| T::LAYOUT.visible(HeadType::Spatial, valid_text + video, valid_text)),
            temporal: videos.map(|video| (half_width - 1).wrapping_sub(Token::of::<T>(video).position::<T>())),
        }
    }

    /// Sets the scores of keys behind the video, which nobody sees, to -inf.
    #[inline(always)]
    fn hide_beyond_end<T: Shape>(&self, scores: &mut impl Fragment, first: u32) {
        let end = self.valid_text + T::LAYOUT.video_tokens();
        if first + KEY_ROWS > end {
            softmax::hide_unseen(scores, first, self.lane, [Visible { prefix: end, start: end, end }; 2]);
        }
    }

    /// Rounds the weights of a tile, whose first key is packed row `first`: dense, spatial and temporal. Adds those of the last two
    /// to `sums`.
    #[inline(always)]
    fn weights<T: Shape>(
        &self,
        dense: &<T::Profile as TileProducts>::Scores,
        first: u32,
        sums: &mut [[f32; 2]; 2],
    ) -> [<T::Profile as TileProducts>::Weights; 3] {
        let (mut spatial, mut temporal) = (*dense, *dense);
        softmax::replace_unseen(&mut spatial, first, self.lane, self.spatial, 0.0);
        if first < self.prefix::<T>() {
            self.hide_from_temporal::<T, true>(&mut temporal, first);
        } else {
            self.hide_from_temporal::<T, false>(&mut temporal, first);
        }
        add_rows(&mut spatial, &mut sums[0]);
        add_rows(&mut temporal, &mut sums[1]);
        [T::Profile::weights(dense), T::Profile::weights(&spatial), T::Profile::weights(&temporal)]
    }

    /// End of text and sink frames, which every query sees.
    #[inline(always)]
    fn prefix<T: Shape>(&self) -> u32 {
        self.valid_text + T::LAYOUT.sink_tokens()
    }

    /// Sets the weights of the keys that the temporal mask hides to zero. Without `PREFIX`, the tile has no key of the prefix.
    #[inline(always)]
    fn hide_from_temporal<T: Shape, const PREFIX: bool>(&self, temporal: &mut impl Fragment, first: u32) {
        let first = first + 2 * (self.lane % 4);
        let in_prefix = |column: u32| PREFIX & (first + column < self.prefix::<T>());
        let shown = 2 * T::LAYOUT.half_width(HeadType::Temporal) - 1;
        let temporal_offset = self.temporal.map(math::opaque);
        // Counted from so many whole frames before the video that text has a place too.
        let frames_before = T::LAYOUT.text_tokens.div_ceil(T::LAYOUT.tokens_per_frame);
        let mut token = Token::of::<T>(first + frames_before * T::LAYOUT.tokens_per_frame - self.valid_text);
        token.frame = token.frame.wrapping_sub(frames_before);
        temporal.for_each_group(
            #[inline(always)]
            |group, [a, b, c, d]| {
                let column = |column: u32, token: Token, upper: &mut f32, lower: &mut f32| {
                    let (position, in_prefix) = (token.position::<T>(), in_prefix(column));
                    // Logic without short circuits: predicates are cheaper than branches.
                    let hides = |row: usize| !(in_prefix | (position.wrapping_add(temporal_offset[row]) < shown));
                    if hides(0) {
                        *upper = 0.0;
                    }
                    if hides(1) {
                        *lower = 0.0;
                    }
                };
                column(group * 8, token, a, c);
                column(group * 8 + 1, token.after::<T>(1), b, d);
                token = token.after::<T>(8);
            },
        );
    }
}

/// A video token in the model's frame-major order.
#[derive(Clone, Copy)]
struct Token {
    frame: u32,
    patch: u32,
}

impl Token {
    #[inline(always)]
    fn of<T: Shape>(video: u32) -> Token {
        Token { frame: video / T::LAYOUT.tokens_per_frame, patch: video % T::LAYOUT.tokens_per_frame }
    }

    /// The token `count` further on, for a constant count: no division is left.
    #[inline(always)]
    fn after<T: Shape>(self, count: u32) -> Token {
        let tokens = T::LAYOUT.tokens_per_frame;
        let (frame, patch) = (self.frame.wrapping_add(count / tokens), self.patch + count % tokens);
        if patch < tokens {
            Token { frame, patch }
        } else {
            Token { frame: frame.wrapping_add(1), patch: patch - tokens }
        }
    }

    /// Position in the temporal layout.
    #[inline(always)]
    fn position<T: Shape>(self) -> u32 {
        (self.patch * T::LAYOUT.frames).wrapping_add(self.frame)
    }
}

/// Adds each row of a fragment to its sum.
#[inline(always)]
fn add_rows(fragment: &mut impl Fragment, sums: &mut [f32; 2]) {
    fragment.for_each(
        #[inline(always)]
        |i, value| sums[softmax::row_of(i)] += *value,
    );
}

/// Writes sums and unnormalised outputs of the thread's two samples, from column `64 columns` on.
#[inline(always)]
unsafe fn store_mask<T: Shape>(
    place: u64,
    samples: [u32; 2],
    sums: [f32; 2],
    output: &mut impl Fragment,
    lane: u32,
    columns: u32,
) {
    // The quad's lanes hold the sums of their own columns of the tiles.
    let sums = sums.map(
        #[inline(always)]
        |sum| warp::sum::<4>(sum),
    );
    if lane % 4 == 0 && columns == 0 {
        global::store_f32(place + samples[0] as u64 * 4, sums[0]);
        global::store_f32(place + samples[1] as u64 * 4, sums[1]);
    }
    let column = columns * COLUMNS + 2 * (lane % 4);
    output.for_each_group(
        #[inline(always)]
        |group, [a, b, c, d]| {
            let row = |row: usize| place + (SAMPLE_ROWS + samples[row] * T::HEAD_DIM + group * 8 + column) as u64 * 4;
            global::store_f32x2(row(0), [*a, *b]);
            global::store_f32x2(row(1), [*c, *d]);
        },
    );
}

/// The body of **select**: one warp a sample, then one thread a head.
///
/// # Safety
/// As [`profile`], after it on the same stream.
#[inline(always)]
pub unsafe fn select<T: Shape>(params: &SelectParams) {
    let head = thread::block_z();
    let (own_warp, lane) = (thread::warp(), thread::lane());
    let mut errors = [0.0f32; 2];
    let mut row = own_warp;
    while row < T::PROFILE_ROWS {
        let merge = Merge::of::<T>(params, head, row, lane);
        let mut column = lane * 2;
        while column < T::HEAD_DIM {
            let [dense, spatial, temporal] = merge.columns::<T>(column);
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
        let mean = total.map(|error| error * (1.0 / (T::PROFILE_ROWS * T::HEAD_DIM) as f32));
        global::store_f32x2(params.errors + head as u64 * 8, mean);
        let head_type = if mean[1] < mean[0] { HeadType::Temporal } else { HeadType::Spatial };
        global::store_u32(params.head_types + head as u64 * 4, head_type as u32);
    }
}

/// One sample's results in all splits: each lane knows the weight of one split.
struct Merge {
    /// First f32 of the first split.
    partials: u64,
    plan: ProfilePlan,
    sample: u32,
    /// 2^(maximum of the lane's split - maximum of all); 0 for a lane without a split.
    weight: f32,
    /// One over the sum of weights of dense, spatial, temporal; 0 where the mask leaves nothing that f32 can tell from 0.
    factors: [f32; 3],
}

impl Merge {
    #[inline(always)]
    unsafe fn of<T: Shape>(params: &SelectParams, head: u32, row: u32, lane: u32) -> Merge {
        let plan = Plan::<T>::partials(params.splits);
        let (group, sample) = (row / SAMPLE_ROWS, row % SAMPLE_ROWS);
        let partials = params.partials + plan.offset(head, group, 0) * 4;
        let own = |index: u32| partials + (lane * plan.split_floats() + index + sample) as u64 * 4;
        let (mut max, mut sums) = (f32::NEG_INFINITY, [0.0; 3]);
        if lane < params.splits {
            max = global::load_f32(own(0));
            sums = [0, 1, 2].map(
                #[inline(always)]
                |mask| global::load_f32(own(plan.mask_offset(mask))),
            );
        }
        let weight = math::exp2(max - warp::max::<32>(max));
        let factors = sums.map(
            #[inline(always)]
            |sum| {
                let total = warp::sum::<32>(weight * sum);
                // A division in full precision would be a call. Below the normal numbers the reciprocal would be infinite.
                if total >= f32::MIN_POSITIVE { math::reciprocal(total) } else { 0.0 }
            },
        );
        Merge { partials, plan, sample, weight, factors }
    }

    /// Columns `column` and `column + 1` of the output under each mask.
    #[inline(always)]
    unsafe fn columns<T: Shape>(&self, column: u32) -> [[f32; 2]; 3] {
        // So many splits' loads are in flight together. A lane without a split has weight 0: its turn repeats the last split's values.
        const AT_ONCE: usize = 4;
        let mut outputs = [[0.0f32; 2]; 3];
        let mut first = 0;
        while first < self.plan.splits {
            let mut values = [[[0.0f32; 2]; 3]; AT_ONCE];
            let mut i = 0;
            while i < AT_ONCE {
                let split = (first + i as u32).min(self.plan.splits - 1) * self.plan.split_floats();
                let own = self.sample * T::HEAD_DIM + column;
                let load = |mask: u32| {
                    let place = split + self.plan.mask_offset(mask) + SAMPLE_ROWS + own;
                    global::load_f32x2(self.partials + place as u64 * 4)
                };
                values[i] = [load(0), load(1), load(2)];
                i += 1;
            }
            i = 0;
            while i < AT_ONCE {
                let weight = warp::broadcast(self.weight, first + i as u32);
                let add = |mask: usize, half: usize| math::fma(weight, values[i][mask][half], outputs[mask][half]);
                outputs = [[add(0, 0), add(0, 1)], [add(1, 0), add(1, 1)], [add(2, 0), add(2, 1)]];
                i += 1;
            }
            first += AT_ONCE as u32;
        }
        let scaled = |mask: usize| [outputs[mask][0] * self.factors[mask], outputs[mask][1] * self.factors[mask]];
        [scaled(0), scaled(1), scaled(2)]
    }
}
