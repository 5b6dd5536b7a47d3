//! Where everything lies in the one allocation that a layer needs besides Q, K, V and the output.

use core::ops::Range;

use crate::image::e4m3;
use crate::layout::HeadType;
use crate::params::SCHEDULE_BYTES;
use crate::spec::Spec;

/// Every part starts at a multiple of this many bytes if the allocation does, as `cudaMalloc`
/// promises. Bulk copies of packed tensors ask for less.
pub const ALIGNMENT: u64 = 256;

/// Byte ranges of the parts of a workspace, relative to its start, and its size.
/// [`crate::spec::Spec::workspace`] makes it.
///
/// What is never needed at the same time shares memory. Profiling comes first, then attention in 8
/// bits, then attention in 16 bits. With heads in 16 bits, there are three places of images, and
/// each image in 8 bits lies in a place of its own head:
///
/// ```text
/// profiling           samples, partials | K in 16 bits      | V in 16 bits
/// attention, 8 bits            partials | Q and K in 8 bits | V in 8 bits
/// attention, 16 bits  Q in 16 bits      | K in 16 bits      | V in 16 bits
/// ```
///
/// Without heads in 16 bits, profiling goes over the keys in two halves, so that its images take no
/// more than those of attention:
///
/// ```text
/// profiling           half of K and V in 16 bits, samples, partials
/// attention, 8 bits   Q, K, V in 8 bits
/// ```
///
/// Nothing in a workspace outlives a layer, except `errors`, `head_types`, `precision_errors` and
/// `precisions` for whoever wants to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceLayout {
    /// Packed Q, K and V as **attention** in 16 bits reads them, an [image](crate::image) of each
    /// head. They are empty where no head is in 16 bits.
    pub packed: [Range<u64>; 3],
    /// Packed Q, K and V as **attention** in 8 bits reads them, an image of each head. From one to
    /// the next are [`Spec::e4m3_image_rows`] rows. They are empty where no head is in 8 bits.
    pub packed_e4m3: [Range<u64>; 3],
    /// The sampled rows of packed Q, as [`ProfileParams::samples`](crate::params::ProfileParams)
    /// says.
    pub samples: Range<u64>,
    /// Packed K as **profile** reads it, in 16 bits: an image of the first `profiled_rows` rows of
    /// each head. From one to the next are as many bytes as all rows have.
    pub profiled_k: Range<u64>,
    /// Packed V, likewise.
    pub profiled_v: Range<u64>,
    /// Rows of K and V that are profiled at a time: all packed rows, or half of the keys. The other
    /// half comes in the place of the first.
    pub profiled_rows: u32,
    /// Partial results of profiling, f32, as [`PartialsLayout`](crate::params::PartialsLayout)
    /// says.
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

/// Gives places one behind the other.
#[derive(Clone, Copy)]
struct Places {
    /// End of those that were given.
    end: u64,
}

impl Places {
    fn place(&mut self, bytes: u64) -> Range<u64> {
        let start = self.end.next_multiple_of(ALIGNMENT);
        self.end = start + bytes;
        start..self.end
    }

    /// Goes on behind these and `others`.
    fn join(&mut self, others: Places) {
        self.end = self.end.max(others.end);
    }
}

impl WorkspaceLayout {
    /// Places the parts for `batch` items of `heads` heads, profiled over `splits` parts of the
    /// keys.
    pub fn new(spec: &Spec, batch: u32, heads: u32, splits: u32) -> WorkspaceLayout {
        let (image, rows, profiled_rows) = (spec.image(), spec.layout.packed_rows(), spec.profiled_rows());
        let (partials, [in_16_bits, in_8_bits]) = (spec.partials(splits), spec.precisions());
        let all_heads = u64::from(batch) * u64::from(heads);
        let of_heads = |rows: u32| all_heads * u64::from(image.bytes(rows));
        // Two images of each head, of which the second begins so many bytes behind the first.
        let beside = |place: &Range<u64>, bytes: u32| {
            let bytes = u64::from(bytes);
            [place.start..place.end - bytes, place.start + bytes..place.end]
        };
        let no_images = || [0..0, 0..0, 0..0];
        let mut places = Places { end: 0 };
        let mut profiling = places;
        let results = |profiling: &mut Places| {
            [of_heads(partials.group_rows()), partials.bytes(all_heads)].map(|bytes| profiling.place(bytes))
        };
        let (packed, packed_e4m3, [profiled_k, profiled_v], [samples, partials]);
        if in_16_bits {
            let q = places.place(of_heads(rows));
            [samples, partials] = results(&mut profiling);
            places.join(profiling);
            let [k, v] = [(); 2].map(|()| places.place(of_heads(rows)));
            [profiled_k, profiled_v] = [k.clone(), v.clone()];
            let [q_e4m3, k_e4m3] = beside(&k, rows * e4m3::ROW_BYTES);
            packed_e4m3 = if in_8_bits { [q_e4m3, k_e4m3, v.clone()] } else { no_images() };
            packed = [q, k, v];
        } else {
            packed = no_images();
            packed_e4m3 = [(); 3].map(|()| places.place(all_heads * u64::from(e4m3::bytes(rows))));
            [profiled_k, profiled_v] = beside(&profiling.place(of_heads(rows)), image.bytes(profiled_rows));
            [samples, partials] = results(&mut profiling);
            places.join(profiling);
        }
        let errors = places.place(all_heads * HeadType::CANDIDATES.len() as u64 * 4);
        let (head_types, schedule) = (places.place(all_heads * 4), places.place(SCHEDULE_BYTES));
        let (center, word) = if in_8_bits { (u64::from(e4m3::CENTER_FLOATS) * 4, 4) } else { (0, 0) };
        let centers = places.place(all_heads * center);
        let (precision_errors, precisions) = (places.place(all_heads * word), places.place(all_heads * word));
        WorkspaceLayout {
            packed,
            packed_e4m3,
            samples,
            profiled_k,
            profiled_v,
            profiled_rows,
            partials,
            errors,
            head_types,
            schedule,
            centers,
            precision_errors,
            precisions,
            bytes: places.end.next_multiple_of(ALIGNMENT),
        }
    }
}
