//! Parameter blocks of the kernels. `no_std`. The host writes them, and the kernels read them: one
//! block for each kernel, passed by value.
//!
//! Addresses are device addresses. 0 means "not given" where a field says that it may be. Strides
//! count elements.

use crate::blocks::SAMPLE_ROWS;
use crate::layout::HeadType;

/// A tensor of rows of `head_dim` contiguous elements, in the model's order.
///
/// Element (b, s, h, d) lies at `data + (b batch + s row + h head + d) * size_of::<element>()`.
/// This covers \[B, S, H, D\], \[B, H, S, D\], packed QKV and slices.
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

/// The affine part of a QK-norm, f32. It has `head_dim` elements, or heads x head_dim when the
/// statistic is over all heads.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NormWeights {
    /// Address of the weight. 0 means ones.
    pub weight: u64,
    /// Address of the bias of a layer norm. 0 means zeros.
    pub bias: u64,
}

/// Which heads a launch of **pack** writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum PackPass {
    /// It writes every head, in the layout of its type. Where `head_types` is 0, every head gets
    /// the spatial layout.
    All = 0,
    /// It writes what **profile** reads: K and V of every head in the spatial layout, and of Q only
    /// the sampled rows.
    BeforeProfiling = 1,
    /// It writes what **attention** reads besides: Q of every head, and K and V of temporal heads.
    AfterProfiling = 2,
}

/// Parameters of **pack**, which applies norm and RoPE, and reorders Q, K and V into packed images.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PackParams {
    /// Q as the projection left it: the tensor that has the video rows. Here and in the next eight,
    /// rows count from the first of the sequence, whether the tensor has that one or not.
    pub q: Tensor,
    /// K, likewise.
    pub k: Tensor,
    /// V, likewise.
    pub v: Tensor,
    /// The tensor that has the text of Q before the video.
    pub q_before: Tensor,
    /// That of K, likewise.
    pub k_before: Tensor,
    /// That of V, likewise.
    pub v_before: Tensor,
    /// The tensor that has the text of Q after the video.
    pub q_after: Tensor,
    /// That of K, likewise.
    pub k_after: Tensor,
    /// That of V, likewise.
    pub v_after: Tensor,
    /// QK-norm of video rows of Q.
    pub q_norm: NormWeights,
    /// QK-norm of video rows of K.
    pub k_norm: NormWeights,
    /// QK-norm of Q's text before the video.
    pub q_norm_before: NormWeights,
    /// QK-norm of K's text before the video.
    pub k_norm_before: NormWeights,
    /// QK-norm of Q's text after the video.
    pub q_norm_after: NormWeights,
    /// QK-norm of K's text after the video.
    pub k_norm_after: NormWeights,
    /// RoPE cosines, f32 \[rows, channels / 2\], or \[rows, heads, channels / 2\] when each head
    /// has its own. Rows are the video rows, in the model's order with the text of those sides that
    /// are rotated too.
    pub cos: u64,
    /// RoPE sines, of the same shape.
    pub sin: u64,
    /// Elements from one batch item's table to the next, a multiple of 4. 0 means that all items
    /// share one.
    pub rope_batch: u64,
    /// Valid text tokens before the video of each batch item, u32 \[batch\]. 0 means that all are
    /// valid.
    pub before_lengths: u64,
    /// Those after the video, likewise.
    pub after_lengths: u64,
    /// Head types, u32 \[batch, heads\]. 0 packs every head in the spatial layout.
    pub head_types: u64,
    /// Packed Q, an [image](crate::image) of each head. Before profiling it has only the sampled
    /// rows ([`ProfileParams::samples`]).
    pub packed_q: u64,
    /// Packed K, likewise an image of each head.
    pub packed_k: u64,
    /// Packed V, likewise.
    pub packed_v: u64,
    /// Seed with which sampled rows are drawn.
    pub seed: u64,
    /// Memory that pack sets to zero for the **attention** that follows:
    /// [`AttentionParams::schedule`].
    pub schedule: u64,
    /// The centers of V, for attention in 8 bits ([`e4m3`](crate::image::e4m3)): f32 \[batch,
    /// heads, [`CENTER_FLOATS`](crate::image::e4m3::CENTER_FLOATS)\]. It is 0 where there are none.
    pub centers: u64,
    /// Precisions, u32 \[batch, heads\]: the [bits](crate::dtype::Compute::bits) in which each head
    /// multiplies. A kernel leaves out heads of another precision than its own. 0 means that it
    /// leaves out none.
    pub precisions: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads of this launch, which may be others than the spec's.
    pub heads: u32,
    /// Softmax scale x log2(e). Packed Q is multiplied by it, so that products of packed rows are
    /// exponents of two.
    pub scale_log2: f32,
    /// Which heads are written, a [`PackPass`].
    pub pass: u32,
    /// 1 when every address and stride of Q, K and V is a multiple of 16 bytes, else 0.
    pub aligned: u32,
    /// First packed row of K and V that is written before profiling.
    pub first_key: u32,
    /// End of the packed rows of K and V that are written before profiling.
    pub end_key: u32,
    /// This field keeps the size a multiple of 8.
    pub reserved: u32,
}

/// Parameters of **profile**, which computes attention of sampled rows, dense and under each
/// candidate mask, over parts of the keys.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProfileParams {
    /// The sampled rows of packed Q, an [image](crate::image) of each head. It has whole groups of
    /// 64 samples, of which those beyond the last repeat it.
    pub samples: u64,
    /// Packed K, in which every head has the spatial layout.
    pub packed_k: u64,
    /// Packed V, likewise.
    pub packed_v: u64,
    /// Valid text tokens before the video of each batch item, u32 \[batch\]. 0 means that all are
    /// valid.
    pub before_lengths: u64,
    /// Those after the video, likewise.
    pub after_lengths: u64,
    /// Where the partial results of the launch's first split go. [`PartialsLayout`] says how they
    /// lie.
    pub partials: u64,
    /// Seed with which sampled rows are drawn.
    pub seed: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// Parts that the keys of a head are split into, at most
    /// [`MOST_SPLITS`](crate::blocks::MOST_SPLITS). The launch has some or all of them.
    pub splits: u32,
    /// Half width of the spatial band in tokens, 1 to N.
    pub spatial_half_width: u32,
    /// Half width of the temporal band in tokens, 1 to N.
    pub temporal_half_width: u32,
    /// First packed row of the keys of this launch, a multiple of
    /// [`PROFILE_KEY_ROWS`](crate::blocks::PROFILE_KEY_ROWS).
    pub first_key: u32,
    /// End of their packed rows. No other rows are there.
    pub end_key: u32,
    /// This field keeps the size a multiple of 8.
    pub reserved: u32,
}

impl ProfileParams {
    /// The half widths of the bands, in the order of [`HeadType::CANDIDATES`].
    #[inline(always)]
    pub const fn half_widths(&self) -> [u32; HeadType::CANDIDATES.len()] {
        // As two fields, each is read where it is needed. An array would be copied to the stack,
        // because the type of a head chooses an element.
        [self.spatial_half_width, self.temporal_half_width]
    }
}

/// Parameters of **select**, which merges the splits, measures each candidate mask and names each
/// head's type.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SelectParams {
    /// The partial results of **profile**.
    pub partials: u64,
    /// Where mean squared errors against dense attention go, f32 \[batch, heads, candidates\].
    pub errors: u64,
    /// Where head types go, u32 \[batch, heads\]: the candidate with the lowest error, the first of
    /// equal ones.
    pub head_types: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// Parts that the keys of a head are split into.
    pub splits: u32,
    /// This field keeps the size a multiple of 8.
    pub reserved: u32,
}

/// Parameters of **judge**, which compares attention in 8 bits with what **profile** computed in
/// 16, and says in which precision each head is to multiply.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct JudgeParams {
    /// The partial results of **profile**.
    pub partials: u64,
    /// The output of attention in 8 bits ([`AttentionParams::out`]).
    pub out: Tensor,
    /// Head types, u32 \[batch, heads\].
    pub head_types: u64,
    /// The centers of V ([`PackParams::centers`]).
    pub centers: u64,
    /// Where relative errors over the sampled rows go, f32 \[batch, heads\].
    pub errors: u64,
    /// Where precisions go, u32 \[batch, heads\]: 8 where the error is at most `largest_error`,
    /// else 16.
    pub precisions: u64,
    /// Seed with which sampled rows were drawn.
    pub seed: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// Parts that the keys of a head are split into.
    pub splits: u32,
    /// The largest error of a head in 8 bits.
    pub largest_error: f32,
}

/// Parameters of **attention**, which computes softmax(scale Q K^T) V over the visible pairs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionParams {
    /// Packed Q, in which each head has the layout of its type.
    pub packed_q: u64,
    /// Packed K, likewise.
    pub packed_k: u64,
    /// Packed V, likewise.
    pub packed_v: u64,
    /// The output, in the model's order. Rows of invalid text are zero.
    pub out: Tensor,
    /// Where the natural log-sum-exp of the scaled scores goes, f32 \[batch, heads, S\] in the
    /// model's order. Rows of invalid text get -inf. 0 asks for none.
    pub lse: u64,
    /// Head types, u32 \[batch, heads\]. 0 means that every head is dense.
    pub head_types: u64,
    /// Valid text tokens before the video of each batch item, u32 \[batch\]. 0 means that all are
    /// valid.
    pub before_lengths: u64,
    /// Those after the video, likewise.
    pub after_lengths: u64,
    /// Two u32 that are 0 before and after. They count the query tiles that blocks have taken
    /// beyond their first, and the blocks that are done.
    pub schedule: u64,
    /// The centers of V ([`PackParams::centers`]).
    pub centers: u64,
    /// Precisions of the heads ([`PackParams::precisions`]).
    pub precisions: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// 1 when the address and every stride of `out` are multiples of 16 bytes, else 0.
    pub aligned: u32,
    /// Half width of the spatial band in tokens, 1 to N.
    pub spatial_half_width: u32,
    /// Half width of the temporal band in tokens, 1 to N.
    pub temporal_half_width: u32,
    /// This field keeps the size a multiple of 8.
    pub reserved: u32,
}

impl AttentionParams {
    /// The half widths of the bands, in the order of [`HeadType::CANDIDATES`].
    #[inline(always)]
    pub const fn half_widths(&self) -> [u32; HeadType::CANDIDATES.len()] {
        // As two fields, each is read where it is needed. An array would be copied to the stack,
        // because the type of a head chooses an element.
        [self.spatial_half_width, self.temporal_half_width]
    }
}

/// Bytes of the memory at [`AttentionParams::schedule`].
pub const SCHEDULE_BYTES: u64 = 8;

/// How the partial results of profiling lie: f32 \[batch x heads, groups of 64 samples, splits,
/// masks, ..\], with the masks in the order of [`HeadType::ALL`].
///
/// Those of one mask are
///
/// * \[64\]: what was subtracted from the scaled scores of each sample (log2),
/// * \[64\]: the sums of the weights that came of it,
/// * \[64, head_dim\]: the outputs, which are not normalised yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialsLayout {
    /// Sampled rows of a head.
    pub rows: u32,
    /// Groups of 64 samples.
    pub groups: u32,
    /// Parts that the keys of a head are split into.
    pub splits: u32,
    /// Elements of a row.
    pub head_dim: u32,
}

impl PartialsLayout {
    /// The layout for `rows` sampled rows of `head_dim` elements, with the keys in `splits` parts.
    #[inline(always)]
    pub const fn new(rows: u32, head_dim: u32, splits: u32) -> PartialsLayout {
        PartialsLayout { rows, groups: rows.div_ceil(SAMPLE_ROWS), splits, head_dim }
    }

    /// Rows of whole groups: samples of a head, of which those beyond the last repeat it.
    #[inline(always)]
    pub const fn group_rows(&self) -> u32 {
        self.groups * SAMPLE_ROWS
    }

    /// Number of f32 of one (head, group, split).
    #[inline(always)]
    pub const fn split_floats(&self) -> u32 {
        self.mask_offset(HeadType::ALL.len() as u32)
    }

    /// Index, in a split, of the first f32 of a mask. `mask` is the number of its [`HeadType`].
    #[inline(always)]
    pub const fn mask_offset(&self, mask: u32) -> u32 {
        SAMPLE_ROWS * mask * (2 + self.head_dim)
    }

    /// Index of the first f32 of (head, group, split). `head` counts over batch x heads.
    ///
    /// A launch has at most 65,535 heads of 16 groups of
    /// [`MOST_SPLITS`](crate::blocks::MOST_SPLITS), so 32 bits count its splits.
    #[inline(always)]
    pub const fn offset(&self, head: u32, group: u32, split: u32) -> u64 {
        ((head * self.groups + group) * self.splits + split) as u64 * self.split_floats() as u64
    }

    /// Bytes of the results of `heads` heads, counted over batch x heads.
    pub const fn bytes(&self, heads: u64) -> u64 {
        heads * (self.groups as u64 * self.splits as u64 * self.split_floats() as u64 * 4)
    }
}
