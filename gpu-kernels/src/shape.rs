//! What `attention_kernels!` states of a spec, as constants that the kernels are compiled for.

use crate::cuda::mma::TileProducts;
use framestride_shapes::launch::Tiles;
use framestride_shapes::layout::Layout;
use framestride_shapes::operators::{QkNorm, Rope};

/// One spec.
pub trait Shape {
    /// Frames, text, sinks, half widths.
    const LAYOUT: Layout;
    /// Heads of the model: the extent of a norm over all heads.
    const HEADS: u32;
    /// 64 or 128.
    const HEAD_DIM: u32;
    /// QK-norm.
    const QK_NORM: Option<QkNorm>;
    /// Rotary embedding.
    const ROPE: Option<Rope>;
    /// Sampled rows a head.
    const PROFILE_ROWS: u32;
    /// Tiles of the attention kernel.
    const TILES: Tiles;
    /// Products of the attention kernel, on key tiles of `TILES.key_rows`.
    type Attention: TileProducts;
    /// Products of the profile kernel, on key tiles of [`PROFILE_KEY_ROWS`](framestride_shapes::launch::PROFILE_KEY_ROWS).
    type Profile: TileProducts;
}
