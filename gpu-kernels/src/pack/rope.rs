//! RoPE of a lane's eight elements.

use crate::cuda::{global, math, warp};
use crate::model::Model;
use framestride_shapes::params::PackParams;

/// Whether a chunk of a head is rotated, or lies behind the rotated channels.
#[inline(always)]
fn is_rotated<M: Model>(chunk: u32) -> bool {
    // The first comparison is one of constants, and leaves no code where it holds.
    M::numbers().rope_channels == M::HEAD_DIM || chunk < M::numbers().rope_channels / 8
}

/// The chunk that a rotated chunk of one half is paired with, in the other half.
#[inline(always)]
fn partner<M: Model>(chunk: u32) -> u32 {
    let half = M::numbers().rope_channels / 16;
    if chunk < half { chunk + half } else { chunk - half }
}

/// The tables of a batch item: addresses of its cosines and sines.
#[derive(Clone, Copy)]
pub struct Tables {
    cos: u64,
    sin: u64,
}

impl Tables {
    #[inline(always)]
    pub fn of_item(params: &PackParams, item: u32) -> Tables {
        let offset = item as u64 * params.rope_batch * 4;
        Tables { cos: params.cos + offset, sin: params.sin + offset }
    }
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

    /// Loads them from row `row` of the tables. A chunk that is not rotated gets the identity.
    #[inline(always)]
    pub unsafe fn load<M: Model>(tables: Tables, row: u32, chunk: u32) -> Rotation {
        let row = row as u64 * (M::numbers().rope_channels / 2 * 4) as u64;
        let mut rotation = Rotation::IDENTITY;
        if !is_rotated::<M>(chunk) {
            return rotation;
        }
        if M::numbers().rope_interleaved {
            let place = row + (chunk * 16) as u64;
            let (cos, sin) = (global::load_f32x4(tables.cos + place), global::load_f32x4(tables.sin + place));
            let mut i = 0;
            while i < 4 {
                (rotation.cos[i], rotation.sin[i]) = (cos[i], sin[i]);
                i += 1;
            }
        } else {
            let partner = partner::<M>(chunk);
            let place = row + (chunk.min(partner) * 32) as u64;
            rotation =
                Rotation { cos: global::load_f32x8(tables.cos + place), sin: global::load_f32x8(tables.sin + place) };
            // The lanes of the lower half hold a, and those of the upper half b.
            if chunk < partner {
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
    pub unsafe fn apply<M: Model>(&self, x: [f32; 8], chunk: u32) -> [f32; 8] {
        let Rotation { cos, sin } = self;
        let mut out = x;
        if M::numbers().rope_interleaved {
            let mut i = 0;
            while i < 4 {
                let (a, b) = (x[2 * i], x[2 * i + 1]);
                out[2 * i] = math::fma(a, cos[i], -(b * sin[i]));
                out[2 * i + 1] = math::fma(b, cos[i], a * sin[i]);
                i += 1;
            }
        } else {
            // Lanes that differ like the chunks hold them for the same head. Between whole halves the
            // distance is a constant, which takes no register.
            let is_whole = M::numbers().rope_channels == M::HEAD_DIM;
            let lanes = if is_whole { M::HEAD_DIM / 16 } else { chunk ^ partner::<M>(chunk) };
            let mut i = 0;
            while i < 8 {
                out[i] = math::fma(warp::exchange(x[i], lanes), sin[i], x[i] * cos[i]);
                i += 1;
            }
        }
        // A product with a sine of zero would make a NaN of an infinity.
        if !is_rotated::<M>(chunk) {
            out = x.map(
                #[inline(always)]
                |x| x * cos[0],
            );
        }
        out
    }
}
