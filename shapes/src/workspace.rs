//! Where everything lies in the one allocation that a layer needs besides Q, K, V and the output.

use core::ops::Range;

use crate::dtype::Compute;
use crate::image::e4m3;
use crate::layout::{HeadType, Layout};
use crate::numbers::Template;
use crate::params::{PartialsLayout, SCHEDULE_BYTES};

/// Every part starts at a multiple of this many bytes if the allocation does, as `cudaMalloc`
/// promises. Bulk copies of packed tensors ask for less.
pub const ALIGNMENT: u64 = 256;

/// Byte ranges of the parts of a workspace, relative to its start, and its size.
/// [`crate::spec::Spec::workspace`] makes it.
///
/// The images of attention in 8 bits lie where profiling had its own, which nobody reads then: that of
/// a head at the beginning of the place of the same head. So heads of both precisions lie beside each other.
///
/// Nothing in a workspace outlives a layer, except `errors`, `head_types`, `precision_errors` and
/// `precisions` for whoever wants to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceLayout {
    /// Packed Q, \[batch, heads, packed_rows, head_dim\]: an [image](crate::image) of each head.
    pub packed_q: Range<u64>,
    /// Packed K, likewise.
    pub packed_k: Range<u64>,
    /// Packed V, likewise.
    pub packed_v: Range<u64>,
    /// Partial results of profiling, f32, as [`PartialsLayout`] says.
    pub partials: Range<u64>,
    /// Mean squared errors of the candidate masks, f32 \[batch, heads, candidates\].
    pub errors: Range<u64>,
    /// Head types, u32 \[batch, heads\].
    pub head_types: Range<u64>,
    /// The counters by which the blocks of attention share their work:
    /// [`AttentionParams::schedule`](crate::params::AttentionParams).
    pub schedule: Range<u64>,
    /// The centers of V, for attention in 8 bits
    /// ([`PackParams::centers`](crate::params::PackParams)). Else it is empty.
    pub centers: Range<u64>,
    /// Relative errors of the heads in 8 bits, f32 \[batch, heads\]. Where attention has no 8 bits, it
    /// is empty.
    pub precision_errors: Range<u64>,
    /// Precisions of the heads, u32 \[batch, heads\], as
    /// [`PackParams::precisions`](crate::params::PackParams) says, likewise.
    pub precisions: Range<u64>,
    /// Bytes of the whole, a multiple of [`ALIGNMENT`].
    pub bytes: u64,
}

impl WorkspaceLayout {
    /// Places the parts for `batch` items of `heads` heads.
    pub fn new(
        layout: &Layout,
        template: Template,
        batch: u32,
        heads: u32,
        partials: PartialsLayout,
    ) -> WorkspaceLayout {
        let mut bytes = 0;
        let mut place = |size: u64| {
            let start = bytes;
            bytes = (start + size).next_multiple_of(ALIGNMENT);
            start..start + size
        };
        let all_heads = u64::from(batch) * u64::from(heads);
        let packed = all_heads * u64::from(template.image.bytes(layout.packed_rows()));
        let (packed_q, packed_k, packed_v) = (place(packed), place(packed), place(packed));
        let partials = place(partials.bytes(all_heads));
        let errors = place(all_heads * HeadType::CANDIDATES.len() as u64 * 4);
        let (head_types, schedule) = (place(all_heads * 4), place(SCHEDULE_BYTES));
        let (center, word) = match template.compute {
            Compute::Dtype => (0, 0),
            Compute::E4m3 => (u64::from(e4m3::CENTER_FLOATS) * 4, 4),
        };
        let centers = place(all_heads * center);
        let (precision_errors, precisions) = (place(all_heads * word), place(all_heads * word));
        WorkspaceLayout {
            packed_q,
            packed_k,
            packed_v,
            partials,
            errors,
            head_types,
            schedule,
            centers,
            precision_errors,
            precisions,
            bytes,
        }
    }
}
