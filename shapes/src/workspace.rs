//! Where everything lies in the one allocation that a layer needs besides Q, K, V and the output.

use core::ops::Range;

use crate::image::{Image, e4m3};
use crate::layout::{HeadType, Layout};
use crate::params::{PartialsLayout, SCHEDULE_BYTES};

/// Every part starts at a multiple of this many bytes if the allocation does, as `cudaMalloc`
/// promises. Bulk copies of packed tensors ask for less.
pub const ALIGNMENT: u64 = 256;

/// Byte ranges of the parts of a workspace, relative to its start, and its size.
/// [`crate::spec::Spec::workspace`] makes it.
///
/// The images of attention in 8 bits lie where profiling had its own, which nobody reads then.
/// Where heads have both precisions, an image in 8 bits lies at the beginning of the place of one
/// in 16. Where all are in 8 bits, Q in 16 has no place at all. Those of a head are
///
/// ```text
/// place of K in 16 bits        place of V in 16 bits
/// Q in 8 bits, K in 8 bits     V in 8 bits
/// ```
///
/// Nothing in a workspace outlives a layer, except `errors`, `head_types`, `precision_errors` and
/// `precisions` for whoever wants to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceLayout {
    /// Packed Q as **attention** reads it, an [image](crate::image) of each head. From that of one
    /// head to that of the next are as many bytes as one in 16 bits has.
    pub packed_q: Range<u64>,
    /// Packed K, likewise.
    pub packed_k: Range<u64>,
    /// Packed V, likewise.
    pub packed_v: Range<u64>,
    /// The sampled rows of packed Q, as [`ProfileParams::samples`](crate::params::ProfileParams)
    /// says.
    pub samples: Range<u64>,
    /// Packed K as **profile** reads it, \[batch, heads, packed_rows, head_dim\] in 16 bits.
    pub profiled_k: Range<u64>,
    /// Packed V, likewise.
    pub profiled_v: Range<u64>,
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
    /// Relative errors of the heads in 8 bits, f32 \[batch, heads\]. Where attention has no 8 bits,
    /// it is empty.
    pub precision_errors: Range<u64>,
    /// Precisions of the heads, u32 \[batch, heads\], as
    /// [`PackParams::precisions`](crate::params::PackParams) says, likewise.
    pub precisions: Range<u64>,
    /// Bytes of the whole, a multiple of [`ALIGNMENT`].
    pub bytes: u64,
}

impl WorkspaceLayout {
    /// Places the parts for `batch` items of `heads` heads. `precisions` says whether there are
    /// heads in 16 bits, and whether in 8.
    pub fn new(
        layout: &Layout,
        image: Image,
        [in_16_bits, in_8_bits]: [bool; 2],
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
        let of_heads = |rows: u32| all_heads * u64::from(image.bytes(rows));
        let packed = of_heads(layout.packed_rows());
        let queries = in_16_bits.then(|| place(packed));
        let (profiled_k, profiled_v) = (place(packed), place(packed));
        let (packed_q, packed_k) = match queries {
            Some(queries) => (queries, profiled_k.clone()),
            None => {
                let bytes = u64::from(e4m3::ROW_BYTES * layout.packed_rows());
                let Range { start, end } = profiled_k;
                (start..end - bytes, start + bytes..end)
            }
        };
        let samples = place(of_heads(partials.group_rows()));
        let partials = place(partials.bytes(all_heads));
        let errors = place(all_heads * HeadType::CANDIDATES.len() as u64 * 4);
        let (head_types, schedule) = (place(all_heads * 4), place(SCHEDULE_BYTES));
        let (center, word) = if in_8_bits { (u64::from(e4m3::CENTER_FLOATS) * 4, 4) } else { (0, 0) };
        let centers = place(all_heads * center);
        let (precision_errors, precisions) = (place(all_heads * word), place(all_heads * word));
        WorkspaceLayout {
            packed_q,
            packed_k,
            packed_v: profiled_v.clone(),
            samples,
            profiled_k,
            profiled_v,
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
