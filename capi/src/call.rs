//! The structure of a call, and what it becomes for the library.

use std::ffi::c_void;
use std::mem::offset_of;

use framestride::shapes::params::{NormWeights, Tensor};
use framestride::{Found, HeadTypes, Layer, SparseAttention, Text};

use crate::argument::{Structure, check_reserved};
use crate::spec::unknown;
use crate::status::{Failure, Result};

/// Rows of head_dim contiguous elements, in the type of the spec. Element (b, s, h, d) is
/// data[b * batch + s * row + h * head + d].
///
/// So [B, S, H, D], [B, H, S, D], packed QKV and slices are all tensors. `data` and strides may be any
/// multiples of 2 bytes; those that are multiples of 16 bytes are faster.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_tensor {
    /// Element (0, 0, 0, 0).
    pub data: *mut c_void,
    /// Elements from one batch item to the next.
    pub batch: u64,
    /// Elements from one token to the next.
    pub row: u64,
    /// Elements from one head to the next.
    pub head: u64,
}

/// The affine part of a norm of Q or K, contiguous, at multiples of 16 bytes. It has head_dim
/// elements, or heads x head_dim where a statistic is over all heads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_norm {
    /// NULL is ones.
    pub weight: *const f32,
    /// NULL is zeros. Only a layer norm has one.
    pub bias: *const f32,
}

/// The text on one side of the video.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_text {
    /// Its rows [B, tokens, H, D], where they lie in tensors of their own. All three are given, or
    /// none: then the rows are among those of the call's q, k and v, before the video or after it.
    pub q: framestride_tensor,
    pub k: framestride_tensor,
    pub v: framestride_tensor,
    /// How many tokens of each item are valid, [B]. Valid ones come first. NULL: all are.
    pub lengths: *const u32,
    /// The norms of these rows, where has_q_norm and has_k_norm are 1. Else they have those of the
    /// video.
    pub q_norm: framestride_norm,
    pub k_norm: framestride_norm,
    pub has_q_norm: u32,
    pub has_k_norm: u32,
}

/// Where the types of heads come from.
pub type framestride_head_types = u32;
/// The call profiles the heads, and takes what it finds.
pub const FRAMESTRIDE_HEAD_TYPES_PROFILED: framestride_head_types = 0;
/// Every head is dense.
pub const FRAMESTRIDE_HEAD_TYPES_DENSE: framestride_head_types = 1;
/// The caller gives them.
pub const FRAMESTRIDE_HEAD_TYPES_GIVEN: framestride_head_types = 2;

/// Everything that one call reads and writes. Set all of it to zero, then what there is.
///
/// All memory belongs to the caller: memory of the GPU, or of the process for the emulator. It stays
/// as it is until the work is done. The structure itself is read during the call alone. Two calls that
/// may run at the same time have different workspaces.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_call {
    /// sizeof(framestride_call).
    pub size: u64,
    /// Q, K and V [B, S, H, D] as the projections left them, neither normalised nor rotated. Rows of
    /// text that has tensors of its own are not among these. The output has all S rows.
    pub q: framestride_tensor,
    pub k: framestride_tensor,
    pub v: framestride_tensor,
    /// The output [B, S, H, D]. It may be the memory of q, k or v (but see `precisions`). Rows of invalid text are zero.
    pub out: framestride_tensor,
    /// The norms of video rows, where the spec has a norm.
    pub q_norm: framestride_norm,
    pub k_norm: framestride_norm,
    /// The text before the video and after it.
    pub before: framestride_text,
    pub after: framestride_text,
    /// The tables of RoPE, where the spec has it: contiguous [rows, channels / 2], or
    /// [rows, heads, channels / 2] where each head has its own, at multiples of 16 bytes. Rows are
    /// those of the video, and those of text that is rotated too.
    pub cos: *const f32,
    pub sin: *const f32,
    /// Elements from one item's table to the next, a multiple of 4. 0: all items share one.
    pub rope_batch: u64,
    /// Where the natural log-sum-exp of each row's scaled scores goes, [B, H, S]. NULL: nowhere.
    pub lse: *mut f32,
    /// The types of heads [B, H], for FRAMESTRIDE_HEAD_TYPES_GIVEN. NULL: else.
    pub head_types: *const u32,
    /// Where a call that profiles writes what it finds. The types are [B, H]. The errors are
    /// [B, H, 2]: mean squared errors of the spatial and of the temporal mask, against dense attention
    /// of the sampled rows. NULL: nowhere.
    pub found_head_types: *mut u32,
    pub found_errors: *mut f32,
    /// framestride_workspace_bytes bytes or more at a multiple of 256. All layers may use it in turn.
    pub workspace: *mut c_void,
    pub workspace_bytes: u64,
    /// Seed of the rows that profiling samples, where has_seed is 1. Else the spec's is taken.
    pub seed: u64,
    pub has_seed: u32,
    pub head_types_from: framestride_head_types,
    /// Half widths of the bands in tokens, 1 to N. 0: the spec's.
    pub spatial_half_width: u32,
    pub temporal_half_width: u32,
    /// Softmax scale. 0: 1 / sqrt(head_dim).
    pub scale: f32,
    pub reserved: u32,
    /// In how many bits heads multiply [B, H], where the spec has a largest_error: 8 in 8 bits, any other
    /// number in the type of the tensors. NULL: a call that profiles finds it, and another one computes all
    /// heads in that type. The output is not the memory of q, k or v, unless the call neither profiles nor
    /// is given these.
    pub precisions: *const u32,
    /// Where a call writes what it finds: 8 or 16 [B, H], and the relative errors of 8 bits over the sampled
    /// rows [B, H]. NULL: nowhere.
    pub found_precisions: *mut u32,
    pub found_precision_errors: *mut f32,
}

// SAFETY: it begins with its size, and consists of numbers and pointers.
unsafe impl Structure for framestride_call {
    const NAME: &str = "framestride_call";
    const LEAST: usize = offset_of!(framestride_call, precisions);
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

impl framestride_tensor {
    fn tensor(self) -> Tensor {
        let framestride_tensor { data, batch, row, head } = self;
        Tensor { data: address(data), batch, row, head }
    }
}

impl framestride_norm {
    fn weights(self) -> NormWeights {
        NormWeights { weight: address(self.weight), bias: address(self.bias) }
    }
}

impl framestride_text {
    fn text(self, side: &str) -> Result<Text> {
        let tensors = [self.q, self.k, self.v];
        let given = tensors.iter().filter(|tensor| !tensor.data.is_null()).count();
        if given % tensors.len() != 0 {
            let (found, allowed) = (format!("{given} of the three tensors"), "q, k and v, or none of them");
            return Err(Failure::argument(side, found, allowed, "Give all three, or leave data at NULL"));
        }
        Ok(Text {
            qkv: (given > 0).then(|| tensors.map(framestride_tensor::tensor)),
            lengths: address(self.lengths),
            q_norm: flag("has_q_norm", self.has_q_norm)?.then(|| self.q_norm.weights()),
            k_norm: flag("has_k_norm", self.has_k_norm)?.then(|| self.k_norm.weights()),
        })
    }
}

fn flag(name: &str, value: u32) -> Result<bool> {
    match value {
        0 | 1 => Ok(value == 1),
        other => Err(unknown(name, other, "0 or 1")),
    }
}

impl framestride_call {
    /// The layer of this call, and where its head types come from.
    pub(crate) fn layer(&self, attention: &SparseAttention) -> Result<(Layer, HeadTypes)> {
        check_reserved(&[self.reserved])?;
        let types = match self.head_types_from {
            FRAMESTRIDE_HEAD_TYPES_PROFILED => HeadTypes::Profiled,
            FRAMESTRIDE_HEAD_TYPES_DENSE => HeadTypes::Dense,
            FRAMESTRIDE_HEAD_TYPES_GIVEN => HeadTypes::Given(address(self.head_types)),
            other => return Err(unknown("head_types_from", other, "0 (profiled), 1 (dense) or 2 (given)")),
        };
        if !matches!(types, HeadTypes::Given(_)) && !self.head_types.is_null() {
            let allowed = "NULL, unless head_types_from is FRAMESTRIDE_HEAD_TYPES_GIVEN";
            return Err(Failure::argument("head_types", "an address", allowed, "Set head_types_from, or pass NULL"));
        }
        let own = attention.module().spec().layout;
        let or = |half_width: u32, own: u32| if half_width == 0 { own } else { half_width };
        let half_widths = [
            or(self.spatial_half_width, own.spatial_half_width),
            or(self.temporal_half_width, own.temporal_half_width),
        ];
        let layer = Layer {
            q: self.q.tensor(),
            k: self.k.tensor(),
            v: self.v.tensor(),
            out: self.out.tensor(),
            q_norm: self.q_norm.weights(),
            k_norm: self.k_norm.weights(),
            before: self.before.text("before")?,
            after: self.after.text("after")?,
            cos: address(self.cos),
            sin: address(self.sin),
            rope_batch: self.rope_batch,
            lse: address(self.lse),
            found: Found {
                head_types: address(self.found_head_types),
                errors: address(self.found_errors),
                precisions: address(self.found_precisions),
                precision_errors: address(self.found_precision_errors),
            },
            precisions: address(self.precisions),
            half_widths: Some(half_widths),
            scale: (self.scale != 0.0).then_some(self.scale),
            seed: flag("has_seed", self.has_seed)?.then_some(self.seed),
        };
        Ok((layer, types))
    }
}
