//! What is checked of a call before anything is launched.
//!
//! Addresses, strides, overlaps, softmax scale and number of heads are checked. What lies in device
//! memory is the caller's promise.

use std::ops::Range;

use framestride_shapes::layout::HeadType;
use framestride_shapes::params::Tensor;
use framestride_shapes::spec::{NormKind, Spec};
use framestride_shapes::workspace::WorkspaceLayout;

use crate::error::{Error, Result};
use crate::layer::{HeadTypes, Layer};

/// The shape of q, k, v and out.
#[derive(Clone, Copy)]
pub(crate) struct TensorShape {
    pub batch: u32,
    pub rows: u32,
    pub heads: u32,
    pub head_dim: u32,
    /// Bytes of an element.
    pub element: u64,
}

/// Bytes of the widest access in the kernels.
const WIDE: u64 = 16;

/// Bytes of a word: an f32 or a u32.
const WORD: u64 = 4;

impl TensorShape {
    /// The extent and the stride, in elements, of the three outer dimensions. Those of extent 1 are
    /// left out.
    fn dimensions(self, tensor: &Tensor) -> impl Iterator<Item = (u64, u64)> {
        [(self.batch, tensor.batch), (self.rows, tensor.row), (self.heads, tensor.head)]
            .into_iter()
            .filter(|&(extent, _)| extent > 1)
            .map(|(extent, stride)| (extent.into(), stride))
    }

    /// The byte range of a tensor, if it ends below 2^64.
    fn bytes(self, tensor: &Tensor) -> Option<Range<u64>> {
        let mut last = u64::from(self.head_dim) - 1;
        for (extent, stride) in self.dimensions(tensor) {
            last = last.checked_add((extent - 1).checked_mul(stride)?)?;
        }
        let bytes = last.checked_add(1)?.checked_mul(self.element)?;
        Some(tensor.data..tensor.data.checked_add(bytes)?)
    }
}

/// Whether every row starts at a multiple of 16 bytes.
pub(crate) fn is_aligned(tensor: &Tensor, shape: TensorShape) -> bool {
    tensor.data.is_multiple_of(WIDE)
        && shape.dimensions(tensor).all(|(_, stride)| stride.is_multiple_of(WIDE / shape.element))
}

/// A name, and the range of device memory that has it.
type Region = (String, Range<u64>);

/// Checks the tensors of a call, and what else it reads and writes.
pub(crate) fn check_call(
    spec: &Spec,
    shape: TensorShape,
    layer: &Layer,
    types: HeadTypes,
    workspace: u64,
    layout: &WorkspaceLayout,
) -> Result<()> {
    let tensor = |name: &str, tensor: &Tensor| -> Result<Region> {
        check_address(name, tensor.data, shape.element)?;
        let bytes = shape.bytes(tensor).ok_or_else(|| {
            Error::input(
                format!("{name}, strides"),
                format!("{tensor:?}"),
                "a tensor that ends below 2^64",
                "Strides count elements, not bytes, and are not negative",
            )
        })?;
        Ok((name.to_owned(), bytes))
    };
    let projections = [tensor("q", &layer.q)?, tensor("k", &layer.k)?, tensor("v", &layer.v)?];
    let out = tensor("out", &layer.out)?;
    check_disjoint_rows(&layer.out, shape)?;

    // These regions are read besides Q, K and V.
    let mut read = Vec::new();
    let affine = [
        ("q_norm", Some(layer.q_norm)),
        ("k_norm", Some(layer.k_norm)),
        ("before.q_norm", layer.before.q_norm),
        ("before.k_norm", layer.before.k_norm),
        ("after.q_norm", layer.after.q_norm),
        ("after.k_norm", layer.after.k_norm),
    ];
    for (name, weights) in affine {
        let Some(weights) = weights else { continue };
        let kind = spec.qk_norm.as_ref().map(|norm| norm.kind);
        for (part, address, allowed) in
            [("weight", weights.weight, kind.is_some()), ("bias", weights.bias, kind == Some(NormKind::Layer))]
        {
            if address == 0 {
                continue;
            }
            if !allowed {
                return Err(Error::input(
                    format!("{name}.{part}"),
                    format!("address {address:#x}"),
                    format!("0: the QK-norm of spec {} has none", spec.name),
                    "Pass 0, or change [qk_norm] in the spec",
                ));
            }
            let words = spec.norm_length(shape.heads).into();
            read.push(words_at(&format!("{name}.{part}"), address, WIDE, words)?);
        }
    }
    let tables = rope_elements(spec, shape, layer.rope_batch)?;
    for (name, address) in [("cos", layer.cos), ("sin", layer.sin)] {
        match (spec.rope.is_some(), address) {
            (true, address) => read.push(words_at(name, address, WIDE, tables)?),
            (false, 0) => {}
            (false, address) => {
                return Err(Error::input(
                    name,
                    format!("address {address:#x}"),
                    format!("0: spec {} has no RoPE", spec.name),
                    "Pass 0, or add [rope] to the spec",
                ));
            }
        }
    }
    let all_heads = u64::from(shape.batch) * u64::from(shape.heads);
    for (name, lengths) in [("before.lengths", layer.before.lengths), ("after.lengths", layer.after.lengths)] {
        if lengths != 0 {
            read.push(words_at(name, lengths, 4, shape.batch.into())?);
        }
    }
    if let HeadTypes::Given(address) = types {
        // The types that an earlier call left in the workspace may stay there.
        if address != workspace + layout.head_types.start {
            read.push(words_at("head types", address, 4, all_heads)?);
        }
    }
    let lse = match layer.lse {
        0 => None,
        address => Some(words_at("lse", address, 4, all_heads * u64::from(shape.rows))?),
    };

    // Q, K and V are read before out is written, so they may share its memory. Nothing else that is
    // written may lie in memory of anything else.
    let workspace = ("workspace".to_owned(), workspace..workspace + layout.bytes);
    for region in read.iter().chain(&projections).chain([&out]).chain(&lse) {
        check_apart(region, &workspace)?;
    }
    for region in read.iter().chain(&lse) {
        check_apart(region, &out)?;
    }
    match &lse {
        Some(lse) => read.iter().chain(&projections).try_for_each(|region| check_apart(region, lse)),
        None => Ok(()),
    }
}

/// Checks how many heads a launch has. Any number is allowed that the kernels can count, but a
/// QK-norm over all heads needs exactly those of the spec.
///
/// `subject` is what an error calls the thing whose heads are counted.
pub fn check_heads(spec: &Spec, heads: usize, subject: &str) -> Result<()> {
    let (found, most) = (format!("{heads} heads"), spec.most_launch_heads());
    if spec.norm_is_over_heads() && heads != spec.heads as usize {
        let allowed = format!("exactly {}: the QK-norm of spec {} is over all heads", spec.heads, spec.name);
        return Err(Error::input(subject, found, allowed, "Give that many heads, or change attention.heads"));
    }
    if heads == 0 || heads > most as usize {
        let allowed = format!("1 to {most} heads for spec {}", spec.name);
        return Err(Error::input(subject, found, allowed, "Give that many heads, or split them over several calls"));
    }
    Ok(())
}

/// Checks a softmax scale ([`Layer::scale`]).
///
/// An element of a row of root mean square 1 is at most sqrt(head_dim), and the product of two such
/// rows is at most head_dim. Below its normal numbers, f32 arithmetic in the kernels has only zero.
pub fn check_scale(spec: &Spec, scale: f32) -> Result<()> {
    let largest = spec.dtype.largest();
    let (log2_e, head_dim) = (std::f32::consts::LOG2_E, spec.head_dim as f32);
    let most = (largest / head_dim.sqrt()).min(f32::MAX / head_dim) / log2_e;
    // log2(e) is above 1, so the product of the least scale with it is a normal number too.
    let least = f32::MIN_POSITIVE;
    // NaN lies in no range, so it is refused.
    if (least..=most).contains(&scale) {
        return Ok(());
    }
    Err(Error::input(
        "scale",
        format!("{scale:e}"),
        format!("{least:.1e} to {most:.1e} in {} with head_dim {head_dim}", spec.dtype.as_str()),
        "Leave it out for 1 / sqrt(head_dim)",
    ))
}

/// Elements from the first that a launch reads of the cosines, or the sines, to the last.
fn rope_elements(spec: &Spec, shape: TensorShape, stride: u64) -> Result<u64> {
    let refused = |found: String, allowed: String, mend: &str| Err(Error::input("rope_batch", found, allowed, mend));
    if spec.rope.is_none() {
        return match stride {
            0 => Ok(0),
            _ => refused(
                format!("{stride} elements"),
                format!("0: spec {} has no RoPE", spec.name),
                "Pass 0, or add [rope] to the spec",
            ),
        };
    }
    if !stride.is_multiple_of(WIDE / WORD) {
        return refused(
            format!("{stride} elements"),
            format!(
                "a multiple of {}, so that the tables of every item start at multiples of {WIDE} bytes",
                WIDE / WORD
            ),
            "Pass elements, not bytes or rows: the elements of one table where tables follow each other, 0 where all share one",
        );
    }
    let last = u64::from(shape.batch - 1).checked_mul(stride);
    match last.and_then(|last| last.checked_add(spec.rope_table_elements(shape.heads))) {
        Some(elements) if elements <= u64::MAX / WORD => Ok(elements),
        _ => refused(
            format!("{stride} elements, for {} batch items", shape.batch),
            "tables that end below 2^64".into(),
            "Pass the elements of one table where tables follow each other, 0 where all share one",
        ),
    }
}

/// Checks half widths ([`Layer::half_widths`]).
pub(crate) fn check_half_widths(spec: &Spec, half_widths: [u32; HeadType::CANDIDATES.len()]) -> Result<()> {
    let most = spec.layout.video_tokens();
    for (head_type, half_width) in HeadType::CANDIDATES.into_iter().zip(half_widths) {
        if half_width == 0 || half_width > most {
            return Err(Error::input(
                format!("half_widths, {}", head_type.name()),
                half_width,
                format!("1 to {most} tokens for spec {}", spec.name),
                "Leave it out for the spec's own",
            ));
        }
    }
    Ok(())
}

/// The region of `words` 4-byte words at an address, which must be aligned.
fn words_at(name: &str, address: u64, alignment: u64, words: u64) -> Result<Region> {
    check_address(name, address, alignment)?;
    Ok((name.to_owned(), range_at(name, address, words * WORD)?))
}

/// The range of `bytes` bytes from an address, which must end below 2^64.
pub(crate) fn range_at(name: &str, address: u64, bytes: u64) -> Result<Range<u64>> {
    let end = address.checked_add(bytes).ok_or_else(|| {
        Error::input(
            name,
            format!("{bytes} bytes at {address:#x}"),
            "memory that ends below 2^64",
            "Pass the address of an allocation",
        )
    })?;
    Ok(address..end)
}

pub(crate) fn check_address(name: &str, address: u64, alignment: u64) -> Result<()> {
    if address != 0 && address.is_multiple_of(alignment) {
        return Ok(());
    }
    let found = if address == 0 { "a null address".into() } else { format!("address {address:#x}") };
    Err(Error::input(
        name,
        found,
        format!("device memory at a multiple of {alignment} bytes"),
        "Pass the address of an allocation, or of an aligned part of one",
    ))
}

fn check_apart(a: &Region, b: &Region) -> Result<()> {
    if a.1.end <= b.1.start || b.1.end <= a.1.start {
        return Ok(());
    }
    Err(Error::input(
        &a.0,
        format!("{:#x} to {:#x}, which overlaps {} at {:#x} to {:#x}", a.1.start, a.1.end, b.0, b.1.start, b.1.end),
        "memory of its own",
        "Allocate the two apart",
    ))
}

/// Checks that no element of `out` has two indices. In the order of their strides, each dimension
/// must step over all before it.
fn check_disjoint_rows(out: &Tensor, shape: TensorShape) -> Result<()> {
    let mut dimensions: Vec<(u64, u64)> = shape.dimensions(out).collect();
    dimensions.sort_by_key(|&(_, stride)| stride);
    let mut extent = u64::from(shape.head_dim);
    for (count, stride) in dimensions {
        if stride < extent {
            return Err(Error::input(
                "out, strides",
                format!("batch {}, row {}, head {}", out.batch, out.row, out.head),
                format!(
                    "strides in elements that keep the {} rows apart",
                    u64::from(shape.rows) * u64::from(shape.heads)
                ),
                "Contiguous [B, S, H, D] has row = heads x head_dim, head = head_dim, batch = S x heads x head_dim",
            ));
        }
        extent += (count - 1) * stride;
    }
    Ok(())
}
