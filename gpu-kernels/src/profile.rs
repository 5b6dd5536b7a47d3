//! **profile** and **select**: which mask suits each head (Sparse VideoGen, section 4.1).
//!
//! profile: a block takes 64 sampled rows of one head and one split of its keys. Three consumer warpgroups read the same key
//! tiles: one attends densely, one through the spatial mask, one through the temporal mask. Keys lie in the spatial layout, so the
//! temporal mask is tested by position. Grid: x = splits, y = groups of 64 samples, z = batch x heads.
//!
//! select: merges the splits, and compares both masked outputs with the dense one. Grid: z = batch x heads.

use crate::attention::valid_text;
use crate::cuda::barrier::{self, Barrier};
use crate::cuda::mma::{Descriptor, Fragment, TileProducts};
use crate::cuda::{copy, global, math, shared, thread, warp};
use crate::shape::Shape;
use crate::softmax::{self, Rows};
use framestride_shapes::launch::{
    PROFILE_KEY_ROWS as KEY_ROWS, PROFILE_STAGES as STAGES, PROFILE_THREADS, ProfileParams, ProfilePlan, SAMPLE_ROWS,
    SELECT_THREADS, SelectParams,
};
use framestride_shapes::layout::{ATOM_ROWS, HeadType};

const PRODUCER_REGISTERS: u32 = 24;
const CONSUMER_REGISTERS: u32 = 160;
const CONSUMER_WARPS: u32 = PROFILE_THREADS / 32 - 4;

fn full(stage: u32) -> Barrier {
    Barrier::at(stage)
}
fn free(stage: u32) -> Barrier {
    Barrier::at(STAGES + stage)
}
fn query() -> u32 {
    shared::base() + 1024
}
fn key<T: Shape>(stage: u32) -> u32 {
    query() + (SAMPLE_ROWS + 2 * stage * KEY_ROWS) * T::HEAD_DIM * 2
}
fn value<T: Shape>(stage: u32) -> u32 {
    key::<T>(stage) + KEY_ROWS * T::HEAD_DIM * 2
}

#[inline(always)]
fn plan<T: Shape>(splits: u32) -> ProfilePlan {
    let groups = T::PROFILE_ROWS.div_ceil(SAMPLE_ROWS);
    ProfilePlan { rows: T::PROFILE_ROWS, groups, splits, head_dim: T::HEAD_DIM }
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
    // Parts that differ by one tile at most.
    let (part, rest) = (tiles / params.splits, tiles % params.splits);
    let first_tile = split * part + split.min(rest);
    let last_tile = first_tile + part + (split < rest) as u32;
    let row_bytes = T::HEAD_DIM * 2;
    let head_bytes = T::LAYOUT.packed_rows() as u64 * row_bytes as u64 * head as u64;

    if thread::index() == 0 {
        let mut stage = 0;
        while stage < STAGES {
            full(stage).init(1);
            free(stage).init(CONSUMER_WARPS);
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
            let bytes = KEY_ROWS * row_bytes;
            let mut tile = first_tile;
            while tile < last_tile {
                let (stage, round) = ((tile - first_tile) % STAGES, (tile - first_tile) / STAGES);
                let rows = head_bytes + tile as u64 * bytes as u64;
                free(stage).wait(round % 2 ^ 1);
                full(stage).arrive_expecting(2 * bytes);
                copy::to_shared(key::<T>(stage), params.packed_k + rows, bytes, full(stage));
                copy::to_shared(value::<T>(stage), params.packed_v + rows, bytes, full(stage));
                tile += 1;
            }
        }
    } else {
        thread::take_registers::<CONSUMER_REGISTERS>();
        let mask = (thread_warp - 4) / 4;
        let lane = thread::lane();
        let samples = [thread_warp % 4 * 16 + lane / 4, thread_warp % 4 * 16 + lane / 4 + 8];
        let videos = samples.map(|sample| sampled_row::<T>(params, head, group, sample));
        let visible = videos.map(|video| {
            let head_type = if mask == 1 { HeadType::Spatial } else { HeadType::Dense };
            T::LAYOUT.visible(head_type, valid_text + video, valid_text)
        });
        let positions = videos.map(temporal_position::<T>);
        let query = Descriptor::image(query(), T::HEAD_DIM);
        let mut rows = Rows::new();
        let mut output = <T::Profile as TileProducts>::Output::splat(0.0);
        let mut scores = <T::Profile as TileProducts>::Scores::splat(0.0);
        let mut tile = first_tile;
        while tile < last_tile {
            let (stage, round) = ((tile - first_tile) % STAGES, (tile - first_tile) / STAGES);
            full(stage).wait(round % 2);
            T::Profile::start_scores(&mut scores, query, Descriptor::image(key::<T>(stage), T::HEAD_DIM));
            scores.wait::<0>();
            let first = tile * KEY_ROWS;
            if mask == 2 {
                hide_by_time::<T>(&mut scores, first, lane, valid_text, positions);
            } else if mask == 1 || first + KEY_ROWS > end {
                softmax::hide_unseen(&mut scores, first, lane, visible);
            }
            let rescale = rows.absorb(&mut scores, params.scale_log2);
            softmax::scale_rows(&mut output, rescale);
            let mut weights = T::Profile::weights(&scores);
            T::Profile::start_output(&mut output, &weights, Descriptor::image(value::<T>(stage), T::HEAD_DIM));
            T::Profile::wait_output(&mut output, &mut weights);
            if lane == 0 {
                free(stage).arrive();
            }
            tile += 1;
        }
        let partial = params.partials + plan::<T>(params.splits).offset(head, group, split, mask) * 4;
        store_partial::<T>(partial, samples, &rows, &mut output, lane, params.scale_log2);
    }
}

/// Video row, frame-major, of a sample; samples beyond the last repeat it.
#[inline(always)]
fn sampled_row<T: Shape>(params: &ProfileParams, head: u32, group: u32, sample: u32) -> u32 {
    let index = (group * SAMPLE_ROWS + sample).min(T::PROFILE_ROWS - 1);
    T::LAYOUT.sampled_video_row(params.seed, head, index, T::PROFILE_ROWS)
}

/// Position in the temporal layout of a frame-major video row.
#[inline(always)]
fn temporal_position<T: Shape>(video: u32) -> u32 {
    video % T::LAYOUT.tokens_per_frame * T::LAYOUT.frames + video / T::LAYOUT.tokens_per_frame
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
        shared::store16(query() + place(sample) as u32, global::load16(packed_q + place(row)));
        chunk += PROFILE_THREADS;
    }
}

/// Hides keys of the spatial layout by the temporal mask: `|position(query) - position(key)| < half_width`, text and sinks seen.
#[inline(always)]
fn hide_by_time<T: Shape>(scores: &mut impl Fragment, first: u32, lane: u32, valid_text: u32, positions: [u32; 2]) {
    let first = first + 2 * (lane % 4);
    let prefix = valid_text + T::LAYOUT.sink_tokens();
    let end = valid_text + T::LAYOUT.video_tokens();
    let half_width = T::LAYOUT.half_width(HeadType::Temporal);
    scores.for_each_group(
        #[inline(always)]
        |group, [a, b, c, d]| {
            let column = |key: u32, upper: &mut f32, lower: &mut f32| {
                let position = temporal_position::<T>(key.wrapping_sub(valid_text));
                let sees = |row: u32| key < prefix || (key < end && position.abs_diff(row) < half_width);
                if !sees(positions[0]) {
                    *upper = f32::NEG_INFINITY;
                }
                if !sees(positions[1]) {
                    *lower = f32::NEG_INFINITY;
                }
            };
            column(first + group * 8, a, c);
            column(first + group * 8 + 1, b, d);
        },
    );
}

/// Writes maximum (scaled), sum and unnormalised output of the thread's two samples.
#[inline(always)]
unsafe fn store_partial<T: Shape>(
    partial: u64,
    samples: [u32; 2],
    rows: &Rows,
    output: &mut impl Fragment,
    lane: u32,
    scale_log2: f32,
) {
    let total = rows.total();
    if lane % 4 == 0 {
        let mut row = 0;
        while row < 2 {
            global::store_f32(partial + samples[row] as u64 * 4, rows.max[row] * scale_log2);
            global::store_f32(partial + (SAMPLE_ROWS + samples[row]) as u64 * 4, total[row]);
            row += 1;
        }
    }
    let column = 2 * (lane % 4);
    output.for_each_group(
        #[inline(always)]
        |group, [a, b, c, d]| {
            let place =
                |row: usize| partial + (2 * SAMPLE_ROWS + samples[row] * T::HEAD_DIM + group * 8 + column) as u64 * 4;
            global::store_f32x2(place(0), [*a, *b]);
            global::store_f32x2(place(1), [*c, *d]);
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
    let plan = plan::<T>(params.splits);
    let mut errors = [0.0f32; 2];
    let mut row = own_warp;
    while row < T::PROFILE_ROWS {
        let (group, sample) = (row / SAMPLE_ROWS, row % SAMPLE_ROWS);
        row += SELECT_THREADS / 32;
        let merged = |mask: u32, column: u32| merged_pair(params, &plan, [head, group, mask], sample, column);
        let mut column = lane * 2;
        while column < T::HEAD_DIM {
            let dense = merged(0, column);
            let mut mask = 0;
            while mask < 2 {
                let masked = merged(mask as u32 + 1, column);
                let distance = [masked[0] - dense[0], masked[1] - dense[1]];
                errors[mask] = math::fma(distance[0], distance[0], math::fma(distance[1], distance[1], errors[mask]));
                mask += 1;
            }
            column += 64;
        }
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

/// Columns `column` and `column + 1` of one sample's output, merged over the splits.
#[inline(always)]
unsafe fn merged_pair(
    params: &SelectParams,
    plan: &ProfilePlan,
    [head, group, mask]: [u32; 3],
    sample: u32,
    column: u32,
) -> [f32; 2] {
    let at = |split: u32, index: u32| params.partials + (plan.offset(head, group, split, mask) + index as u64) * 4;
    let mut max = f32::NEG_INFINITY;
    let mut split = 0;
    while split < params.splits {
        max = max.max(global::load_f32(at(split, sample)));
        split += 1;
    }
    let (mut total, mut output) = (0.0, [0.0; 2]);
    split = 0;
    while split < params.splits {
        let weight = math::exp2(global::load_f32(at(split, sample)) - max);
        total = math::fma(weight, global::load_f32(at(split, SAMPLE_ROWS + sample)), total);
        let values = at(split, 2 * SAMPLE_ROWS + sample * plan.head_dim + column);
        output[0] = math::fma(weight, global::load_f32(values), output[0]);
        output[1] = math::fma(weight, global::load_f32(values + 4), output[1]);
        split += 1;
    }
    // A division in full precision would be a call.
    let factor = math::reciprocal(total);
    output.map(|value| value * factor)
}
