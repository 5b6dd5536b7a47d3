//! Parameter blocks of the kernels: the host writes them, the kernels read them. One block per kernel, passed by value.
//!
//! Addresses are device addresses; 0 means "not given" where a field says it may be. Strides count elements.

use crate::blocks::SAMPLE_ROWS;
use crate::layout::HeadType;

/// A tensor of rows of `head_dim` contiguous elements, in the model's order: element (b, s, h, d) lies at
/// `data + (b batch + s row + h head + d) * size_of::<element>()`. Covers \[B, S, H, D\] and \[B, H, S, D\], packed QKV, slices.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tensor {
    /// Address of element (0, 0, 0, 0).
    pub data: u64,
    /// Elements from one batch item to the next.
    pub batch: u64,
    /// Elements from one token to the next.
    pub row: u64,
    /// Elements from one head to the next.
    pub head: u64,
}

/// Affine part of a QK-norm: f32, of `head_dim` elements, or heads x head_dim when the statistic is over all heads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NormWeights {
    /// Address of the weight; 0 for ones.
    pub weight: u64,
    /// Address of the bias (layer norm); 0 for zeros.
    pub bias: u64,
}

/// Which heads a launch of **pack** writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PackPass {
    /// Every head, in the layout of its type; `head_types` 0 packs every head in the spatial layout, as profiling reads it.
    All = 0,
    /// Only heads whose type is temporal: after profiling, the others already lie in their layout.
    Temporal = 1,
}

/// **pack**: norm, RoPE and reordering of Q, K, V into packed images.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PackParams {
    /// Q, K, V as the projection left them.
    pub q: Tensor,
    /// K.
    pub k: Tensor,
    /// V.
    pub v: Tensor,
    /// QK-norm of video rows of Q.
    pub q_norm: NormWeights,
    /// QK-norm of video rows of K.
    pub k_norm: NormWeights,
    /// QK-norm of text rows of Q.
    pub q_norm_text: NormWeights,
    /// QK-norm of text rows of K.
    pub k_norm_text: NormWeights,
    /// RoPE cosines, f32 \[rows, head_dim / 2\], or \[rows, heads, head_dim / 2\] when each head has its own; rows are the video
    /// rows, or all rows of the model's order when text is rotated too.
    pub cos: u64,
    /// RoPE sines, same shape.
    pub sin: u64,
    /// Valid text tokens per batch item, u32 \[batch\]; 0 when all text is valid.
    pub text_lengths: u64,
    /// Head types, u32 \[batch, heads\]; 0 packs every head in the spatial layout.
    pub head_types: u64,
    /// Packed Q: see [`image`](crate::image).
    pub packed_q: u64,
    /// Packed K.
    pub packed_k: u64,
    /// Packed V.
    pub packed_v: u64,
    /// Set to zero for the **attention** that follows, see [`AttentionParams::schedule`].
    pub schedule: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads given in this launch (any subset of the model's).
    pub heads: u32,
    /// Softmax scale x log2(e), by which packed Q is multiplied: products of packed rows are exponents of two.
    pub scale_log2: f32,
    /// A [`PackPass`].
    pub pass: u32,
    /// 1 when every address and stride of q, k, v is a multiple of 16 bytes, else 0.
    pub aligned: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// **profile**: dense, spatial and temporal attention of sampled rows over one split of the keys.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProfileParams {
    /// Packed Q, every head in the spatial layout.
    pub packed_q: u64,
    /// Packed K, likewise.
    pub packed_k: u64,
    /// Packed V, likewise.
    pub packed_v: u64,
    /// Valid text tokens per batch item, u32 \[batch\]; 0 when all text is valid.
    pub text_lengths: u64,
    /// Partial results, see [`PartialsLayout`].
    pub partials: u64,
    /// Seed of the row draw.
    pub seed: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// Splits of the keys of a head, at most [`MOST_SPLITS`](crate::blocks::MOST_SPLITS).
    pub splits: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// **select**: merges the splits, measures both masks, names each head's type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelectParams {
    /// Partial results of **profile**.
    pub partials: u64,
    /// Mean squared errors against dense, f32 \[batch, heads, 2\]: spatial, temporal.
    pub errors: u64,
    /// Head types out, u32 \[batch, heads\]: spatial unless temporal has the lower error.
    pub head_types: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// Splits of the keys.
    pub splits: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// **attention**: softmax(scale Q K^T) V over the visible pairs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionParams {
    /// Packed Q, each head in the layout of its type.
    pub packed_q: u64,
    /// Packed K.
    pub packed_k: u64,
    /// Packed V.
    pub packed_v: u64,
    /// Output in the model's order. Rows of invalid text are zero.
    pub out: Tensor,
    /// Natural log-sum-exp of the scaled scores, f32 \[batch, heads, S\] in the model's order, -inf for invalid text; 0 for none.
    pub lse: u64,
    /// Head types, u32 \[batch, heads\]; 0 when every head is dense.
    pub head_types: u64,
    /// Valid text tokens per batch item, u32 \[batch\]; 0 when all text is valid.
    pub text_lengths: u64,
    /// Two u32, both 0 before and after: query tiles that blocks have taken beyond their first, and blocks that are done.
    pub schedule: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// 1 when the address and every stride of `out` is a multiple of 16 bytes, else 0.
    pub aligned: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// Bytes at [`AttentionParams::schedule`].
pub const SCHEDULE_BYTES: u64 = 8;

/// Where the partial results of profiling lie: f32 \[batch x heads, groups of 64 samples, splits, masks, ..\], the masks in the order
/// of [`HeadType::ALL`]. Those of a mask are
///
/// * \[64\]: what was subtracted from the scaled scores of each sample (log2),
/// * \[64\]: the sums of the weights that came of it,
/// * \[64, head_dim\]: the unnormalised outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialsLayout {
    /// Sampled rows of a head.
    pub rows: u32,
    /// Groups of 64.
    pub groups: u32,
    /// Splits of the keys.
    pub splits: u32,
    /// Size of a row.
    pub head_dim: u32,
}

impl PartialsLayout {
    /// f32 of one (head, group, split).
    #[inline(always)]
    pub const fn split_floats(&self) -> u32 {
        self.mask_offset(HeadType::ALL.len() as u32)
    }

    /// Index, in a split, of the first f32 that belongs to a mask, given as the number of its [`HeadType`].
    #[inline(always)]
    pub const fn mask_offset(&self, mask: u32) -> u32 {
        SAMPLE_ROWS * mask * (2 + self.head_dim)
    }

    /// Index of the first f32 of (head, group, split); `head` counts over batch x heads. A launch has at most 65,535 heads of 16 groups of
    /// [`MOST_SPLITS`](crate::blocks::MOST_SPLITS), so that 32 bits count its splits.
    #[inline(always)]
    pub const fn offset(&self, head: u32, group: u32, split: u32) -> u64 {
        ((head * self.groups + group) * self.splits + split) as u64 * self.split_floats() as u64
    }

    /// Bytes for `heads` = batch x heads.
    pub const fn bytes(&self, heads: u64) -> u64 {
        heads * (self.groups as u64 * self.splits as u64 * self.split_floats() as u64 * 4)
    }
}
