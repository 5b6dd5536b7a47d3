//! RoPE of a lane's eight elements.

use crate::cuda::{global, math, warp};
use crate::model::Model;
use framestride_shapes::norm_rope::Pairs;
use framestride_shapes::params::PackParams;

#[inline(always)]
pub fn rotates_text<M: Model>() -> bool {
    M::ROPE.is_some_and(|rope| rope.text)
}

#[inline(always)]
pub fn rotates_per_head<M: Model>() -> bool {
    M::ROPE.is_some_and(|rope| rope.per_head)
}

#[inline(always)]
fn is_interleaved<M: Model>() -> bool {
    M::ROPE.is_some_and(|rope| matches!(rope.pairs, Pairs::Interleaved))
}

/// Cosines and sines of a lane's eight elements. Interleaved pairs share one, so only the first
/// four are used there. With halves, the sines of the lower half are negative.
#[derive(Clone, Copy)]
pub struct Rotation {
    cos: [f32; 8],
    sin: [f32; 8],
}

impl Rotation {
    pub const IDENTITY: Rotation = Rotation { cos: [1.0; 8], sin: [0.0; 8] };

    /// Loads them from row `row` of the tables.
    #[inline(always)]
    pub unsafe fn load<M: Model>(params: &PackParams, row: u32, chunk: u32) -> Rotation {
        let row = row as u64 * (M::HEAD_DIM / 2 * 4) as u64;
        let mut rotation = Rotation::IDENTITY;
        if is_interleaved::<M>() {
            let place = row + (chunk * 16) as u64;
            let (cos, sin) = (global::load_f32x4(params.cos + place), global::load_f32x4(params.sin + place));
            let mut i = 0;
            while i < 4 {
                (rotation.cos[i], rotation.sin[i]) = (cos[i], sin[i]);
                i += 1;
            }
        } else {
            let place = row + (chunk % (M::HEAD_DIM / 16) * 32) as u64;
            rotation =
                Rotation { cos: global::load_f32x8(params.cos + place), sin: global::load_f32x8(params.sin + place) };
            // The lower half of a head's lanes holds a, and the upper half b.
            if chunk < M::HEAD_DIM / 16 {
                rotation.sin = rotation.sin.map(
                    #[inline(always)]
                    |sin| -sin,
                );
            }
        }
        rotation
    }

    /// The rotation that multiplies by `scale` as well.
    #[inline(always)]
    pub fn scaled(self, scale: f32) -> Rotation {
        let scaled = |values: [f32; 8]| {
            values.map(
                #[inline(always)]
                |value| value * scale,
            )
        };
        Rotation { cos: scaled(self.cos), sin: scaled(self.sin) }
    }

    /// Rotates (a, b) -> (a cos - b sin, b cos + a sin). All lanes of the warp take part.
    #[inline(always)]
    pub unsafe fn apply<M: Model>(&self, x: [f32; 8]) -> [f32; 8] {
        let Rotation { cos, sin } = self;
        let mut out = x;
        if is_interleaved::<M>() {
            let mut i = 0;
            while i < 4 {
                let (a, b) = (x[2 * i], x[2 * i + 1]);
                out[2 * i] = math::fma(a, cos[i], -(b * sin[i]));
                out[2 * i + 1] = math::fma(b, cos[i], a * sin[i]);
                i += 1;
            }
        } else {
            let mut i = 0;
            while i < 8 {
                out[i] = math::fma(warp::exchange(x[i], M::HEAD_DIM / 16), sin[i], x[i] * cos[i]);
                i += 1;
            }
        }
        out
    }
}
