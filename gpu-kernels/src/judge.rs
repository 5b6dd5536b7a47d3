//! **judge** says which heads 8 bits are enough for. It compares rows of the output in 8 bits with what
//! [`profile`](crate::profile) computed of them in 16, under the same mask. Grid: z = batch x heads.
//!
//! The error of a head is the norm of the differences over the norm of what profiling computed,
//! both over all sampled rows. Before they are squared, values are multiplied by the factor by
//! which V was, a power of two. So squares of small values are no zeros, and of large ones not
//! infinite.

use crate::cuda::{global, math, thread};
use crate::element::Element;
use crate::model::Model;
use crate::select::{Sample, block_sums};
use framestride_shapes::blocks::SELECT_THREADS;
use framestride_shapes::dtype::Compute;
use framestride_shapes::image::e4m3::{CENTER_FACTOR, CENTER_FLOATS};
use framestride_shapes::params::JudgeParams;

/// The kernel's body. A warp has one sample at a time, and in the end one thread decides for the
/// head.
///
/// # Safety
/// It is launched with the table that `attention_kernels!` wrote for `M`, after **profile**, **select**
/// and attention in 8 bits of all heads on the same stream.
#[inline(always)]
pub unsafe fn judge<M: Model>(params: &JudgeParams) {
    let head = thread::block_z();
    let samples = M::numbers().profile_rows;
    let mask = global::load_u32(params.head_types + head as u64 * 4);
    // A division by what might be zero would come with a branch to a trap.
    core::hint::assert_unchecked(params.heads != 0);
    let first = (head / params.heads) as u64 * params.out.batch + (head % params.heads) as u64 * params.out.head;
    let factor = global::load_f32(params.centers + (head * CENTER_FLOATS + CENTER_FACTOR) as u64 * 4);
    let (mut error, mut size) = (0.0, 0.0);
    let mut row = thread::warp();
    while row < samples.value {
        let sample = Sample::of::<M>(params.partials, params.splits, head, row, [mask]);
        let factors = sample.factors(thread::lane());
        let video = M::layout().sampled_video_row(params.seed, head, row, samples);
        let element = first + (M::numbers().before_tokens + video) as u64 * params.out.row;
        let mut column = thread::lane() * 2;
        while column < M::HEAD_DIM {
            let [expected] = sample.merge::<M>(column, sample.values::<M>(column, 0), factors);
            let scaled = |values: [f32; 2]| {
                values.map(
                    #[inline(always)]
                    |value| value * factor,
                )
            };
            let address = params.out.data + (element + column as u64) * M::Element::DTYPE.bytes() as u64;
            let (found, expected) = (scaled(M::Element::unpack(global::load4_unaligned(address))), scaled(expected));
            let distance = [found[0] - expected[0], found[1] - expected[1]];
            error = math::fma(distance[1], distance[1], math::fma(distance[0], distance[0], error));
            size = math::fma(expected[1], expected[1], math::fma(expected[0], expected[0], size));
            column += 64;
        }
        row += SELECT_THREADS / 32;
    }
    if let Some([error, size]) = block_sums::<M, 2>([error, size]) {
        let ratio = error * math::reciprocal(size);
        // Where nothing differs, the size may be zero.
        let error = if error == 0.0 { 0.0 } else { ratio * math::reciprocal_sqrt(ratio) };
        // An error that is no number is not within the bound.
        let compute = if error <= params.largest_error { Compute::E4m3 } else { Compute::Dtype };
        global::store_f32(params.errors + head as u64 * 4, error);
        global::store_u32(params.precisions + head as u64 * 4, compute.bits());
    }
}
