//! What `attention_kernels!` states of a spec, as constants that the kernels are compiled for.

use crate::cuda::mma::TileProducts;
use framestride_shapes::launch::Tiles;
use framestride_shapes::layout::Layout;

/// A QK-norm.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// None.
    None,
    /// x / sqrt(mean(x^2) + eps), times the weight.
    Rms,
    /// (x - mean) / sqrt(variance + eps), times the weight, plus the bias.
    Layer,
}

/// Which elements RoPE rotates together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rope {
    /// None.
    None,
    /// 2 i with 2 i + 1.
    Interleaved,
    /// i with i + head_dim / 2.
    Half,
}

/// One spec.
pub trait Shape {
    /// Frames, text, sinks, half widths.
    const LAYOUT: Layout;
    /// Heads of the model: the extent of a norm over all heads.
    const HEADS: u32;
    /// 64 or 128.
    const HEAD_DIM: u32;
    /// QK-norm.
    const NORM: Norm;
    /// One statistic over heads x head_dim, instead of one for each head.
    const NORM_OVER_HEADS: bool;
    /// Added to the mean square or variance.
    const NORM_EPS: f32;
    /// Rotary embedding.
    const ROPE: Rope;
    /// Text rows are rotated too.
    const ROPE_TEXT: bool;
    /// Each head has its own tables.
    const ROPE_PER_HEAD: bool;
    /// Sampled rows a head.
    const PROFILE_ROWS: u32;
    /// Tiles of the attention kernel.
    const TILES: Tiles;
    /// Products of the attention kernel, on key tiles of `TILES.key_rows`.
    type Attention: TileProducts;
    /// Products of the profile kernel, on key tiles of [`PROFILE_KEY_ROWS`](framestride_shapes::launch::PROFILE_KEY_ROWS).
    type Profile: TileProducts;
}
