//! How far a kernel's result may lie from the f64 reference, derived from its arithmetic.
//!
//! The reference gets the very numbers that the kernel reads, so only the kernel's own roundings
//! count:
//!
//! * **Rounding**, to a type whose precision p is 8 bits for bf16, 11 for f16 and 4 for e4m3. The
//!   relative error is at most u = 2^-p. Over many numbers its mean is zero, and its root mean
//!   square is at most u / sqrt(3). The smallest step of f16 is 2^-24 and that of e4m3 is 2^-9, so
//!   half of that is an absolute error on top.
//! * **f32 arithmetic**. The relative error is at most 2^-24 for an operation that rounds, and
//!   2^-22 for the approximate 2^x, log2, 1/x and 1/sqrt(x).
//! * **Tensor-core sums**. A step adds 16 products to the accumulator. Terms are cut, towards zero,
//!   at 25 bits below the largest of them, and their sum is cut to f32. So a step loses at most
//!   `Accumulation::largest_cut` of the largest term: (16 + 4) 2^-25. Cuts of terms of one sign do not average
//!   out. For attention over 119056 keys this allows an error of 4.4e-3. A GPU loses 7.9e-4 there
//!   in f16 if all values are near 1. Random bits cost half of the largest cuts, and partial sums
//!   are smaller than the last. In 8 bits, a step adds 32 products and keeps 13 bits, so it loses at
//!   most 33 2^-13.
//!
//! Worst cases of sums of thousands of rounded terms are so wide that a wrong kernel would pass. So
//! independent roundings are added as variances, as in the probabilistic analysis of Higham and
//! Mary (2019). A result may lie [`DEVIATIONS`] standard deviations away. Errors that do not
//! average out (cuts, scores) are added in full.
//!
//! * **pack** rounds each element once, of a row that is known up to f32 arithmetic. So an element
//!   is one of the numbers that such a row may be rounded to. The statistic of n terms in f32 adds
//!   at most n / 2 roundings. It is half of n, since the root halves a relative error. It is scaled by how far the row's mean lies off centre, in deviations of which eps is a
//!   part. Norm, weights, rotation and scale add at most 16 roundings of values no larger than 4
//!   times the row. In 8 bits, the transform adds three for its sums and two for its factor, of values
//!   as large as the row.
//! * **attention** rounds the weights w of the softmax before the product with V. The variance of a
//!   row of the output is `u^2/3 sum w^2 |v|^2` (`spread^2`). Scores are sums of head_dim products.
//!   They have four roundings and `head_dim / 16` steps. The largest term of a step is at most
//!   twice |q| |k| scale, since an offset may be among the terms. Their error is the relative error
//!   of a weight. The output's own rounding adds ` u^2/3
//!   |out|^2`. The sum over the keys adds a step for each 16 keys, of partial sums about as large
//!   as spread or out. Where scores rise along the keys, the sums so far are multiplied by an
//!   approximate 2^x for each key tile.
//! * **attention in 8 bits** sums the keys of each tile on their own, so its cuts are those of a
//!   tile's steps. They are added in full for all tiles together, and as variances for what one
//!   tile has more than another ([`Attended::apart`]). Weights below 2^-6 lose up to 2^-10, a 32nd of
//!   their tile's mean, and those below 2^-10 are lost. How far cut scores move a row is
//!   computed from the scores. V is summed without its center, which is added exactly.
//! * **the output as a whole** is compared with the root mean square that roundings are expected to
//!   make over many rows ([`expected_error`]).
//! * **the mean error of the output**, where V has a mean, is what cuts take on average. All have one sign
//!   then ([`mean_error`]).
//! * **log-sum-exp** is compared as the relative error of the sum of weights. A thread adds a
//!   quarter of the keys in sequence.
//! * **select** gives mean squared errors between two such outputs of profile, in f32. By the
//!   triangle inequality, the root of the error is wrong by no more than the root mean square
//!   errors of both outputs. Weights under a mask may be relative to the largest of all keys, which
//!   the mask may hide. Their rounding errors are then absolute, but small beside
//!   [`Dtype::least_masked_sum`], which their sum in each split reaches. Splits are merged by the
//!   logarithms of their sums.

use framestride::shapes::blocks::PROFILE_KEY_ROWS;
use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::{Dtype, NormKind, Spec};

use crate::compute_type::ComputeType;
use crate::reference::{Attended, Center, ProfileErrors, UnderEachMask, norm};

/// How many standard deviations a sum of independent roundings may lie away from zero.
pub const DEVIATIONS: f64 = 3.0;

/// How many standard deviations the mean error of an output may lie away from zero by chance. It is
/// looked at once in a case, where rows have so many elements that 3 deviations are rare.
pub const DEVIATIONS_OF_A_MEAN: f64 = 5.0;

/// Largest relative error of an f32 operation that rounds.
const F32: f64 = 1.0 / (1 << 24) as f64;
/// Largest relative error of an approximate f32 function.
const APPROXIMATION: f64 = 4.0 * F32;

/// Largest absolute error of rounding a weight too small for full precision. f32 makes zero of what
/// is below its normal numbers.
fn weight_flush(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => f32::MIN_POSITIVE.into(),
        Dtype::F16 => ComputeType::F16.smallest_error(),
    }
}

/// The error of [`weight_flush`] relative to the largest weight of the row.
///
/// That weight is at least a 64th of the least sum of weights without offsets, since a thread has
/// no more keys of a tile.
fn smallest_weight_error(dtype: Dtype) -> f64 {
    weight_flush(dtype) * 64.0 / f64::from(dtype.tile_sums()[0])
}

/// What rounding to 8 bits takes from the weights of a row where they are small, beside their
/// rounding: as independent errors, and as a part that is lost.
///
/// Weights of 2^-6 and more have the full precision. Of a smaller one 2^-10 is taken at most, a
/// 32nd of the mean of its key tile, or of its largest weight. All of it is lost below 2^-10
/// ([`Attended::SMALL`]).
fn lost_weights(compute: ComputeType, row: &Attended) -> (f64, f64) {
    match compute {
        ComputeType::E4m3 if row.least < 0.5 => (1.0 / 32.0, row.small.min(1.0 / 32.0)),
        _ => (0.0, 0.0),
    }
}

/// Error of the logarithm to base two of a row's sum of weights, and of the offset that is added to
/// it.
fn logarithm_error(row: &Attended) -> f64 {
    APPROXIMATION * (1.0 + row.lse.abs() + row.score_size)
}

/// How far above [`expected_error`] the error of many rows may lie.
pub const OF_EXPECTED: f64 = 1.15;

/// A tolerance that is too wide to tell anything: a row of zeros is within it. What has such a
/// tolerance is not comparable.
pub const BLIND: f64 = 1.0;

/// Tolerance of a normalised, rotated and rounded row of Q or K, relative to the norm of the row
/// when `output` is rounded.
///
/// `input` is the row as it was given, or the whole token for a norm over all heads.
pub fn packed_row(spec: &Spec, compute: ComputeType, input: &[f64], output: &[f64]) -> f64 {
    let mut error = 64.0 * F32 + APPROXIMATION;
    if compute == ComputeType::E4m3 {
        error += 5.0 * F32;
    }
    if let Some(qk_norm) = &spec.qk_norm {
        let terms = spec.norm_length(spec.heads);
        let off_centre = match qk_norm.kind {
            NormKind::Rms => 1.0,
            NormKind::Layer => {
                let count = input.len() as f64;
                let mean = input.iter().sum::<f64>() / count;
                let centred: Vec<f64> = input.iter().map(|x| x - mean).collect();
                1.0 + norm(input) / norm(&centred).hypot((count * qk_norm.eps).sqrt())
            }
        };
        error += f64::from(terms) / 2.0 * F32 * off_centre;
    }
    // An element is off where a number within the error is rounded to another one.
    let error = error * norm(output);
    let rounded: Vec<f64> = output.iter().map(|&x| compute.round(x)).collect();
    let off = |(x, rounded): (&f64, &f64)| {
        let [low, high] = [x - error, x + error].map(|x| (compute.round(x) - rounded).abs());
        low.max(high)
    };
    let off = norm(&output.iter().zip(&rounded).map(off).collect::<Vec<f64>>());
    if off == 0.0 { 0.0 } else { off / norm(&rounded) }
}

/// Tolerance of the mean of V over sampled rows, relative to the size of its rows. It is a sum of
/// [`Center::ROWS`] terms in f32, and each addition may round.
pub fn center() -> f64 {
    Center::ROWS as f64 * F32
}

/// The relative error of a weight that comes from the error of its score. In 8 bits, what cutting
/// the score's sums does is not in it: [`Attended::moved_by_scores`] tells that.
fn score_error(compute: ComputeType, head_dim: usize, row: &Attended) -> f64 {
    let sums = compute.accumulation();
    let cut = match compute {
        ComputeType::Bf16 | ComputeType::F16 => 2.0 * head_dim as f64 / sums.k as f64 * sums.largest_cut(),
        ComputeType::E4m3 => 0.0,
    };
    (cut + 4.0 * F32) * row.score_size + APPROXIMATION
}

/// The error of multiplying a row's sums by an approximate 2^x wherever its offset is lowered, and
/// when parts are merged.
///
/// Offsets are lowered once for each key tile at most, and these errors are independent.
fn rescaling_error(row: &Attended) -> f64 {
    (row.keys as f64 / f64::from(PROFILE_KEY_ROWS) + 1.0).sqrt() * APPROXIMATION
}

/// The most that an accumulator of products with V loses, relative to its largest sum.
fn largest_cut(compute: ComputeType, row: &Attended) -> f64 {
    let keys = row.keys.min(compute.accumulated_keys().unwrap_or(usize::MAX));
    let sums = compute.accumulation();
    keys as f64 / sums.k as f64 * sums.largest_cut()
}

/// The error of an output row before its own rounding: the standard deviation of what averages out,
/// and the size of what does not.
///
/// `rescaled` is the row whose keys may lower the offsets. `weight_error` is the largest absolute
/// error of a weight too small for full precision, relative to the row's largest weight.
fn output_error(compute: ComputeType, row: &Attended, rescaled: &Attended, weight_error: f64) -> (f64, f64) {
    let (small_weights, lost_weights) = lost_weights(compute, row);
    let rounding = (compute.unit_roundoff() / 3f64.sqrt()).hypot(small_weights) * row.spread;
    let partial = row.spread.max(row.summed);
    let rescaling = rescaling_error(rescaled) * partial;
    let cut = largest_cut(compute, row);
    let scores = score_error(compute, row.out.len(), row) * row.spread + row.moved_by_scores[0];
    let systematic = scores + cut * partial + lost_weights * row.summed;
    let steps = weight_error * row.flat_spread;
    // A weight may be rounded to zero. So it changes by no more than itself, and the row by no more
    // than all of it.
    let (steps, lost) = if DEVIATIONS * steps < partial { (steps, 0.0) } else { (0.0, partial) };
    (rounding.hypot(steps).hypot(rescaling).hypot(cut * row.apart), systematic + lost)
}

/// Tolerance of a row of **attention**, relative to the row's norm. The output has the type
/// `dtype`.
pub fn attention_row(dtype: Dtype, compute: ComputeType, row: &Attended) -> f64 {
    let size = norm(&row.out).max(f64::MIN_POSITIVE);
    let weight_error = match compute {
        ComputeType::Bf16 | ComputeType::F16 => smallest_weight_error(dtype),
        ComputeType::E4m3 => 0.0,
    };
    let (deviation, systematic) = output_error(compute, row, row, weight_error);
    let out = ComputeType::from(dtype);
    let store = (out.unit_roundoff() / 3f64.sqrt() * size).hypot(out.smallest_error() * (row.out.len() as f64).sqrt());
    (DEVIATIONS * deviation.hypot(store) + systematic) / size
}

/// The error that an output row of **attention** is expected to have, as an absolute error. It is
/// no bound: independent roundings make it as the root mean square of many rows.
///
/// A number that is rounded lies anywhere between two of its type. So the error of each output has
/// a root mean square of their distance, over sqrt(12). The mantissas of weights are taken to be
/// log-uniform, and the mean of 1 / mantissa^2 is 3 / (8 ln 2) then. Of what cuts may take at most,
/// accumulators that begin at zero lose a quarter.
pub fn expected_error(dtype: Dtype, compute: ComputeType, row: &Attended) -> f64 {
    let weights = compute.unit_roundoff() / (8.0 * std::f64::consts::LN_2).sqrt() * row.spread;
    let steps: Vec<f64> = row.out.iter().map(|&out| ComputeType::from(dtype).step(out)).collect();
    let store = norm(&steps) / 12f64.sqrt();
    let cut = largest_cut(compute, row) / 4.0 * row.summed.hypot(row.apart);
    weights.hypot(store).hypot(cut).hypot(row.moved_by_scores[0])
}

/// The most that accumulators of so many keys lose of their sums on average.
///
/// An accumulator begins at zero and grows evenly. Each step takes half of the largest cut, of a
/// power of two that is at most the sum. In the mean over the steps that is 3/8 of the last sum at
/// most.
pub fn mean_error(compute: ComputeType, keys: usize) -> f64 {
    let sums = compute.accumulation();
    3.0 / 8.0 * keys as f64 / sums.k as f64 * sums.largest_cut() / 2.0
}

/// Tolerance of a whole layer's output row against a reference that never rounds Q and K, as an
/// absolute error.
///
/// `rounded` is the row that the reference gives when Q and K are rounded once they are normalised
/// and rotated, as the kernels store them. `moved` is its distance to the unrounded row.
///
/// By the triangle inequality, that distance is all that rounding Q and K explains, where f32 and
/// f64 round alike. They do not where the f64 value lies within the f32 error of a boundary between
/// two 16-bit numbers. That error is 64 roundings at most (e = 64 2^-24), and the boundaries are 2
/// u apart. That is a fraction e / u of the elements. Each of them is then wrong by 2 u. This makes
/// a root mean square of 2 sqrt(e u), beside the u / sqrt(3) of rounding itself.
pub fn layer_row(dtype: Dtype, compute: ComputeType, rounded: &Attended, moved: f64) -> f64 {
    let u = compute.unit_roundoff();
    let other_side = 2.0 * (64.0 * F32 * u).sqrt() / (u / 3f64.sqrt());
    attention_row(dtype, compute, rounded) * norm(&rounded.out) + moved * (1.0 + DEVIATIONS * other_side)
}

/// Tolerance of exp(lse), relative.
pub fn weight_sum(compute: ComputeType, row: &Attended) -> f64 {
    let sums = (row.keys as f64 / 4.0 + 2.0) * F32;
    let scores = score_error(compute, row.out.len(), row) + row.moved_by_scores[1].exp_m1();
    sums + scores + DEVIATIONS * rescaling_error(row) + logarithm_error(row)
}

/// Largest absolute error of a weight of **profile** too small for full precision, relative to the
/// row's largest weight.
///
/// Under a mask, weights may be relative to all keys.
fn sampled_weight_error(dtype: Dtype, row: &Attended, is_masked: bool) -> f64 {
    let own_offsets = smallest_weight_error(dtype);
    if !is_masked {
        return own_offsets;
    }
    // The sum of the row's weights, relative to the largest, is exp(lse - maximum).
    own_offsets.max(weight_flush(dtype) / f64::from(dtype.least_masked_sum()) * (row.lse - row.maximum).exp())
}

/// Tolerance of a sample's row of **profile** under the mask of one type, before it is rounded.
/// `rows` are the sample's rows under each mask.
pub fn sampled_row(dtype: Dtype, rows: &UnderEachMask, mask: HeadType) -> f64 {
    let (row, dense) = (&rows[mask as usize], &rows[HeadType::Dense as usize]);
    let weight_error = sampled_weight_error(dtype, row, mask != HeadType::Dense);
    let (deviation, systematic) = output_error(dtype.into(), row, dense, weight_error);
    (DEVIATIONS * deviation + systematic) / norm(&row.out).max(f64::MIN_POSITIVE)
}

/// The relative error that merging splits makes in a sample's row. They are merged by the
/// logarithms of their sums, with approximate 2^x and 1/x.
pub fn merged_row(splits: u32, row: &Attended) -> f64 {
    merged(splits, row.lse.abs() + row.score_size)
}

/// [`merged_row`] of a row whose logarithms come to no more than `logarithms`.
fn merged(splits: u32, logarithms: f64) -> f64 {
    APPROXIMATION * (1.0 + logarithms) + 3.0 * APPROXIMATION + f64::from(splits) * F32
}

/// Tolerance of an error that **judge** finds, which is `error`, in `count` elements of samples.
/// Merging moves each row that it compares with by a part of its size, and both sums are added in
/// f32.
pub fn judged(splits: u32, logarithms: f64, count: f64, error: f64) -> f64 {
    (1.0 + error) * merged(splits, logarithms) + error * (2.0 * root_mean(count) + 3.0 * APPROXIMATION)
}

/// The relative error that adding `count` squares in f32 makes in the root of their mean: half of a
/// rounding each.
pub fn root_mean(count: f64) -> f64 {
    count / 2.0 * F32
}

/// Tolerance of the root mean squared error of **profile** for one candidate, relative to the dense
/// output's root mean square.
pub fn profile_error(dtype: Dtype, profile: &ProfileErrors, candidate: HeadType) -> f64 {
    let (mut variance, mut systematic, mut count) = (0.0, 0.0, 0.0);
    for rows in &profile.rows {
        let dense = &rows[HeadType::Dense as usize];
        for mask in [HeadType::Dense, candidate] {
            let row = &rows[mask as usize];
            let weight_error = sampled_weight_error(dtype, row, mask != HeadType::Dense);
            let (deviation, fixed) = output_error(dtype.into(), row, dense, weight_error);
            let merged = fixed + logarithm_error(row) * norm(&row.out);
            variance += deviation * deviation;
            systematic += merged * merged;
        }
        count += dense.out.len() as f64;
    }
    // Merging splits and summing squares make at most one rounding for each row and element.
    let sums = count * F32;
    let root_mean = |sum: f64| (sum / count).sqrt();
    (DEVIATIONS * root_mean(variance) + root_mean(systematic)) / profile.dense_rms.max(f64::MIN_POSITIVE) + sums
}
