//! QK-norm of a row: the statistic over a head or over all heads, and the weights.

use super::row::Heads;
use crate::cuda::{global, math, warp};
use crate::element;
use crate::model::Model;
use framestride_shapes::params::NormWeights;

/// What a norm does before weight and bias: y = (x - mean) factor.
#[derive(Clone, Copy)]
pub struct Statistic {
    mean: f32,
    factor: f32,
}

impl Statistic {
    pub const IDENTITY: Statistic = Statistic { mean: 0.0, factor: 1.0 };

    /// The norm subtracts this mean of elements. `sum` is the lane's part of their sum, and `share`
    /// is one over their number: a division in full precision would be a call. An RMS norm
    /// subtracts nothing.
    #[inline(always)]
    unsafe fn mean<M: Model, const LANES: u32>(sum: f32, share: f32) -> f32 {
        if M::numbers().norm_is_layer { warp::sum::<LANES>(sum) * share } else { 0.0 }
    }

    /// Makes it from the squared distances to the mean. `distance` is the lane's part of their sum.
    #[inline(always)]
    unsafe fn new<M: Model, const LANES: u32>(mean: f32, distance: f32, share: f32) -> Statistic {
        let variance = warp::sum::<LANES>(distance) * share;
        Statistic { mean, factor: math::reciprocal_sqrt(variance + M::numbers().norm_eps) }
    }
}

/// Weight and bias of a lane's eight elements.
#[derive(Clone, Copy)]
pub struct Affine {
    weight: [f32; 8],
    bias: [f32; 8],
}

impl Affine {
    pub const IDENTITY: Affine = Affine { weight: [1.0; 8], bias: [0.0; 8] };

    /// Loads those that there are, from element `first` on.
    #[inline(always)]
    pub unsafe fn load<M: Model>(&mut self, norm: NormWeights, first: u32) {
        if norm.weight != 0 {
            self.weight = global::load_f32x8(norm.weight + first as u64 * 4);
        }
        if M::numbers().norm_is_layer && norm.bias != 0 {
            self.bias = global::load_f32x8(norm.bias + first as u64 * 4);
        }
    }

    #[inline(always)]
    pub fn apply<M: Model>(&self, mut x: [f32; 8], statistic: Statistic) -> [f32; 8] {
        let mut i = 0;
        while i < 8 {
            let distance = distance::<M>(x[i], statistic.mean);
            x[i] = math::fma(distance * statistic.factor, self.weight[i], self.bias[i]);
            i += 1;
        }
        x
    }
}

/// The statistic of a norm over all heads.
#[inline(always)]
pub unsafe fn token_statistic<M: Model>(heads: &mut Heads) -> Statistic {
    let (mut sum, mut distance) = (0.0, 0.0);
    if M::numbers().norm_is_layer {
        heads.each::<M>(
            #[inline(always)]
            |head| sum += element::widen::<M::Element>(head.values).iter().sum::<f32>(),
        );
    }
    let mean = Statistic::mean::<M, 32>(sum, M::numbers().heads_mean);
    heads.each::<M>(
        #[inline(always)]
        |head| {
            if head.read {
                distance += squared_distance::<M>(element::widen::<M::Element>(head.values), mean);
            }
        },
    );
    Statistic::new::<M, 32>(mean, distance, M::numbers().heads_mean)
}

/// The statistic of one head's row, over the lanes that hold it.
#[inline(always)]
pub unsafe fn head_statistic<M: Model>(x: [f32; 8]) -> Statistic {
    if M::HEAD_DIM == 64 { head_statistic_over::<M, 8>(x) } else { head_statistic_over::<M, 16>(x) }
}

#[inline(always)]
unsafe fn head_statistic_over<M: Model, const LANES: u32>(x: [f32; 8]) -> Statistic {
    let share = 1.0 / M::HEAD_DIM as f32;
    let mean = Statistic::mean::<M, LANES>(x.iter().sum(), share);
    Statistic::new::<M, LANES>(mean, squared_distance::<M>(x, mean), share)
}

/// The sum of (x - mean)^2.
#[inline(always)]
fn squared_distance<M: Model>(x: [f32; 8], mean: f32) -> f32 {
    let mut sum = 0.0;
    for x in x {
        let distance = distance::<M>(x, mean);
        sum = math::fma(distance, distance, sum);
    }
    sum
}

/// x - mean. The mean of an RMS norm is 0, and ptxas does not leave out a subtraction of 0.
#[inline(always)]
fn distance<M: Model>(x: f32, mean: f32) -> f32 {
    if M::numbers().norm_is_layer { x - mean } else { x }
}
