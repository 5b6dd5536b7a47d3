//! QK-norm of a row: the statistic over a head or over all heads, and the weights.

use super::row::Heads;
use crate::cuda::{global, math, warp};
use crate::element;
use crate::model::Model;
use framestride_shapes::norm_rope::{NormKind, NormOver};
use framestride_shapes::params::NormWeights;

/// Whether the QK-norm has one statistic for all heads of a token.
#[inline(always)]
pub fn norm_over_heads<M: Model>() -> bool {
    M::QK_NORM.is_some_and(|norm| matches!(norm.over, NormOver::Heads))
}

#[inline(always)]
fn is_layer_norm<M: Model>() -> bool {
    M::QK_NORM.is_some_and(|norm| matches!(norm.kind, NormKind::Layer))
}

/// What a norm does before weight and bias: y = (x - mean) factor.
#[derive(Clone, Copy)]
pub struct Statistic {
    mean: f32,
    factor: f32,
}

impl Statistic {
    pub const IDENTITY: Statistic = Statistic { mean: 0.0, factor: 1.0 };

    /// The norm subtracts this mean of `count` elements. `sum` is the lane's part of their sum. An
    /// RMS norm subtracts nothing.
    #[inline(always)]
    unsafe fn mean<M: Model, const LANES: u32>(sum: f32, count: u32) -> f32 {
        // It is multiplied by the reciprocal of a constant: a division in full precision would be a
        // call.
        if is_layer_norm::<M>() { warp::sum::<LANES>(sum) * (1.0 / count as f32) } else { 0.0 }
    }

    /// Makes it from the squared distances to the mean. `distance` is the lane's part of their sum.
    #[inline(always)]
    unsafe fn new<M: Model, const LANES: u32>(mean: f32, distance: f32, count: u32) -> Statistic {
        let eps = match M::QK_NORM {
            Some(norm) => norm.eps as f32,
            None => 0.0,
        };
        let variance = warp::sum::<LANES>(distance) * (1.0 / count as f32);
        Statistic { mean, factor: math::reciprocal_sqrt(variance + eps) }
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

    /// Loads them from element `first` on.
    #[inline(always)]
    pub unsafe fn load<M: Model>(norm: NormWeights, first: u32) -> Affine {
        let mut affine = Affine::IDENTITY;
        if norm.weight != 0 {
            affine.weight = global::load_f32x8(norm.weight + first as u64 * 4);
        }
        if is_layer_norm::<M>() && norm.bias != 0 {
            affine.bias = global::load_f32x8(norm.bias + first as u64 * 4);
        }
        affine
    }

    #[inline(always)]
    pub fn apply(&self, mut x: [f32; 8], statistic: Statistic) -> [f32; 8] {
        let mut i = 0;
        while i < 8 {
            x[i] = math::fma((x[i] - statistic.mean) * statistic.factor, self.weight[i], self.bias[i]);
            i += 1;
        }
        x
    }
}

/// The statistic of a norm over all heads.
#[inline(always)]
pub unsafe fn token_statistic<M: Model>(heads: &mut Heads) -> Statistic {
    let (mut sum, mut distance) = (0.0, 0.0);
    if is_layer_norm::<M>() {
        heads.each::<M>(
            #[inline(always)]
            |head| sum += element::widen::<M::Element>(head.values).iter().sum::<f32>(),
        );
    }
    let mean = Statistic::mean::<M, 32>(sum, M::HEADS * M::HEAD_DIM);
    heads.each::<M>(
        #[inline(always)]
        |head| {
            if head.read {
                distance += squared_distance(element::widen::<M::Element>(head.values), mean);
            }
        },
    );
    Statistic::new::<M, 32>(mean, distance, M::HEADS * M::HEAD_DIM)
}

/// The statistic of one head's row, over the lanes that hold it.
#[inline(always)]
pub unsafe fn head_statistic<M: Model>(x: [f32; 8]) -> Statistic {
    if M::HEAD_DIM == 64 { head_statistic_over::<M, 8>(x) } else { head_statistic_over::<M, 16>(x) }
}

#[inline(always)]
unsafe fn head_statistic_over<M: Model, const LANES: u32>(x: [f32; 8]) -> Statistic {
    let mean = Statistic::mean::<M, LANES>(x.iter().sum(), M::HEAD_DIM);
    Statistic::new::<M, LANES>(mean, squared_distance(x, mean), M::HEAD_DIM)
}

/// The sum of (x - mean)^2.
#[inline(always)]
fn squared_distance(x: [f32; 8], mean: f32) -> f32 {
    let mut sum = 0.0;
    for x in x {
        sum = math::fma(x - mean, x - mean, sum);
    }
    sum
}
