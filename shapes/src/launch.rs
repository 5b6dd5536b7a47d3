//! Parameter blocks of the kernels: the host writes them, the kernels read them. One block per kernel, passed by value.
//!
//! Addresses are device addresses; 0 means "not given" where a field says it may be. Strides count elements.

use crate::arch::Arch;
use crate::layout::Layout;

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
    /// Packed Q: see [`packed_bytes`].
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
    /// Partial results, see [`ProfilePlan`].
    pub partials: u64,
    /// Seed of the row draw.
    pub seed: u64,
    /// Batch items.
    pub batch: u32,
    /// Heads in this launch.
    pub heads: u32,
    /// Splits of the keys of a head, at most [`MOST_SPLITS`].
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

/// Bytes of one packed tensor (Q, K or V): \[batch, heads, packed_rows, head_dim\] of two-byte elements.
///
/// A head is a sequence of atoms of 8 rows; in an atom, each 64 columns are 1024 bytes: 8 rows of 128 bytes whose 16-byte chunks
/// stand at `chunk ^ (row % 8)` (the 128-byte swizzle). So any 8 k rows are one contiguous, swizzled image of a shared-memory tile:
/// element (row, d) lies at byte `(row / 8 * (head_dim / 64) + d / 64) * 1024 + row % 8 * 128 + ((d % 64 / 8) ^ (row % 8)) * 16 + d % 8 * 2`.
pub const fn packed_bytes(layout: &Layout, head_dim: u32, batch: u32, heads: u32) -> u64 {
    batch as u64 * heads as u64 * layout.packed_rows() as u64 * head_dim as u64 * 2
}

/// Sampled rows of one tensor-core tile (m64).
pub const SAMPLE_ROWS: u32 = 64;

/// Sizes of the partial results of profiling, f32. For each of batch x heads, each group of 64 samples, each split, and dense, spatial
/// and temporal come what was subtracted from the scaled scores of each sample (64, log2), the sums of the weights that came of it
/// (64), and the unnormalised outputs (64 x head_dim).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfilePlan {
    /// Sampled rows of a head.
    pub rows: u32,
    /// Groups of 64.
    pub groups: u32,
    /// Splits of the keys.
    pub splits: u32,
    /// Size of a row.
    pub head_dim: u32,
}

impl ProfilePlan {
    /// f32 of one (head, group, split).
    #[inline(always)]
    pub const fn split_floats(&self) -> u32 {
        self.mask_offset(3)
    }

    /// Index, in a split, of what belongs to mask 0 (dense), 1 (spatial) or 2 (temporal).
    #[inline(always)]
    pub const fn mask_offset(&self, mask: u32) -> u32 {
        SAMPLE_ROWS * mask * (2 + self.head_dim)
    }

    /// Index of the first f32 of (head, group, split); `head` counts over batch x heads. The splits of a launch, at most 65,535 heads of
    /// 16 groups of [`MOST_SPLITS`], are counted in 32 bits.
    #[inline(always)]
    pub const fn offset(&self, head: u32, group: u32, split: u32) -> u64 {
        ((head * self.groups + group) * self.splits + split) as u64 * self.split_floats() as u64
    }

    /// Bytes for `heads` = batch x heads.
    pub const fn bytes(&self, heads: u64) -> u64 {
        heads * (self.groups as u64 * self.splits as u64 * self.split_floats() as u64 * 4)
    }
}

/// Tile sizes of the attention kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Rows of a query tile: 64 for each consumer warpgroup.
    pub query_rows: u32,
    /// Rows of a key tile, a multiple of 16 up to [`PAD_ROWS`](crate::layout::PAD_ROWS).
    pub key_rows: u32,
    /// Key and value tiles in flight.
    pub stages: u32,
}

impl Tiles {
    /// | head dim | query | key | stages | why |
    /// | --- | --- | --- | --- | --- |
    /// | 128 | 128 | 176 | 2 | 5 to 10% faster than 128 keys; 192, where two stages still fit, are 1% faster but spill with text and sinks |
    /// | 64 | 192 | 128 | 4 | three consumer warpgroups of 160 registers share each key tile; 152 KiB shared |
    pub const fn for_head_dim(head_dim: u32) -> Tiles {
        if head_dim == 64 {
            Tiles { query_rows: 192, key_rows: 128, stages: 4 }
        } else {
            Tiles { query_rows: 128, key_rows: 176, stages: 2 }
        }
    }

    /// Consumer warpgroups.
    pub const fn consumers(&self) -> u32 {
        self.query_rows / 64
    }

    /// Threads of a block: the consumers and one producer warpgroup.
    pub const fn threads(&self) -> u32 {
        (self.consumers() + 1) * 128
    }

    /// Bytes of shared memory: barriers (1 KiB, which keeps the tiles aligned to swizzle atoms), the query tile, `stages` key and
    /// value tiles.
    pub const fn shared_bytes(&self, head_dim: u32) -> u32 {
        1024 + (self.query_rows + 2 * self.stages * self.key_rows) * head_dim * 2
    }
}

/// Bytes that a warp of **pack** takes in one step: 16 a lane.
pub const PACK_STEP_BYTES: u32 = 32 * 16;

/// Steps that a warp of **pack** holds in shared memory: a whole row up to 14 KiB (56 heads of 128), so that a multiprocessor has
/// room for two blocks.
pub const fn pack_held_steps(heads: u32, head_dim: u32) -> u32 {
    let steps = (heads * head_dim * 2).div_ceil(PACK_STEP_BYTES);
    if steps < 28 { steps } else { 28 }
}

/// Registers of a thread of **pack**.
const PACK_REGISTERS: u32 = 64;

/// Warps of a block of **pack**, one row each: eight, or four where so more rows have room on a multiprocessor.
pub const fn pack_warps(heads: u32, head_dim: u32) -> u32 {
    if 4 * pack_blocks(4, heads, head_dim) > 8 * pack_blocks(8, heads, head_dim) { 4 } else { 8 }
}

/// Bytes of shared memory of **pack**.
pub const fn pack_shared_bytes(heads: u32, head_dim: u32) -> u32 {
    pack_warps(heads, head_dim) * pack_held_steps(heads, head_dim) * PACK_STEP_BYTES
}

/// Blocks of **pack** on a multiprocessor.
pub const fn pack_min_blocks(heads: u32, head_dim: u32) -> u32 {
    pack_blocks(pack_warps(heads, head_dim), heads, head_dim)
}

/// How many blocks of `warps` warps have room on a multiprocessor, both in its shared memory and with [`PACK_REGISTERS`] a thread.
const fn pack_blocks(warps: u32, heads: u32, head_dim: u32) -> u32 {
    let Arch { shared_bytes, reserved_shared_bytes, registers, .. } = Arch::SM_90A;
    let room = shared_bytes / (reserved_shared_bytes + warps * pack_held_steps(heads, head_dim) * PACK_STEP_BYTES);
    let most = registers / PACK_REGISTERS / (32 * warps);
    if room < most { room } else { most }
}

/// Block of **profile**: a producer warpgroup and two consumer warpgroups.
pub const PROFILE_THREADS: u32 = 3 * 128;

/// Keys of a tile of **profile**.
pub const PROFILE_KEY_ROWS: u32 = 64;

/// Columns of V of one consumer warpgroup of **profile**, which has registers for three outputs of that width.
pub const PROFILE_COLUMNS: u32 = 64;

/// Most splits of the keys of a head: **select** gives each to a lane.
pub const MOST_SPLITS: u32 = 32;

/// Key and value tiles of **profile** in flight, 192 KiB.
pub const fn profile_stages(head_dim: u32) -> u32 {
    768 / head_dim
}

/// Bytes that say which keys of a tile the samples see: two masks of a sample, a bit a key.
pub const PROFILE_SEEN_BYTES: u32 = SAMPLE_ROWS * 2 * PROFILE_KEY_ROWS / 8;

/// Bytes of shared memory of **profile**: barriers (1 KiB, which keeps the tiles aligned to swizzle atoms), the samples, the stages.
pub const fn profile_shared_bytes(head_dim: u32) -> u32 {
    let stage = 2 * PROFILE_KEY_ROWS * head_dim * 2 + PROFILE_SEEN_BYTES;
    1024 + SAMPLE_ROWS * head_dim * 2 + profile_stages(head_dim) * stage
}

/// Block of **select**.
pub const SELECT_THREADS: u32 = 1024;

/// Bytes of shared memory of **select**: two f32 sums for each warp.
pub const SELECT_SHARED_BYTES: u32 = SELECT_THREADS / 32 * 8;
