//! What is checked of a call before anything is launched.
//!
//! Addresses, strides, overlaps, softmax scale and number of heads are checked, and that the device
//! can use the memory. What lies in it is the caller's promise. Only errors allocate.

use std::ops::Range;

use framestride_shapes::dtype::Compute;
use framestride_shapes::layout::{HeadType, Layout};
use framestride_shapes::params::Tensor;
use framestride_shapes::spec::{NormKind, Spec};
use framestride_shapes::workspace::WorkspaceLayout;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::layer::{HeadTypes, Layer, Text};
use crate::plan::Precisions;

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

/// Errors that profiling finds for a head.
const CANDIDATES: u64 = HeadType::CANDIDATES.len() as u64;

impl TensorShape {
    /// The extent and the stride, in elements, of the three outer dimensions. The stride of an extent
    /// of 1 is never used, and 0 here.
    fn dimensions(self, tensor: &Tensor) -> [(u64, u64); 3] {
        [(self.batch, tensor.batch), (self.rows, tensor.row), (self.heads, tensor.head)]
            .map(|(extent, stride)| (extent.into(), if extent > 1 { stride } else { 0 }))
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
        && shape.dimensions(tensor).iter().all(|(_, stride)| stride.is_multiple_of(WIDE / shape.element))
}

/// Q, K and V as a call gives them: those of the layer, and those of text that has tensors of its
/// own. Each comes with its name and shape. `shape` is that of the output.
pub(crate) fn given_tensors(
    spec: &Spec,
    shape: TensorShape,
    layer: &Layer,
) -> impl Iterator<Item = (&'static str, Tensor, TensorShape)> {
    let Layout { before, after, .. } = spec.layout;
    let apart = |text: &Text, tokens: u32| if text.qkv.is_some() { tokens } else { 0 };
    let joined = shape.rows - apart(&layer.before, before) - apart(&layer.after, after);
    [
        (["q", "k", "v"], Some([layer.q, layer.k, layer.v]), joined),
        (["before.q", "before.k", "before.v"], layer.before.qkv, before),
        (["after.q", "after.k", "after.v"], layer.after.qkv, after),
    ]
    .into_iter()
    .filter_map(|(names, qkv, rows)| Some((names, qkv?, rows)))
    .flat_map(move |(names, qkv, rows)| [0, 1, 2].map(|part| (names[part], qkv[part], TensorShape { rows, ..shape })))
}

/// Checks that text with tensors of its own is text that the spec has.
fn check_text_is_there(spec: &Spec, layer: &Layer) -> Result<()> {
    for (name, text, tokens) in
        [("before", &layer.before, spec.layout.before), ("after", &layer.after, spec.layout.after)]
    {
        if text.qkv.is_some() && tokens == 0 {
            return Err(Error::input(
                format!("{name}.qkv"),
                "tensors",
                format!("none: spec {} has no text {name} the video", spec.name),
                format!("Leave them out, or add [{name}] to the spec"),
            ));
        }
    }
    Ok(())
}

/// What a call does with a region of memory.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    Reads,
    /// Q, K and V, which are read before the output is written. So it may be written over them.
    ReadsBeforeOut,
    Writes,
    WritesOut,
}

/// A region of device memory that a call uses.
#[derive(Clone, Copy)]
struct Region {
    name: &'static str,
    start: u64,
    end: u64,
    used: Use,
}

/// The most regions of a call.
const MOST_REGIONS: usize = 40;

/// The regions of a call, in the order in which messages name two that overlap.
struct Regions {
    all: [Region; MOST_REGIONS],
    count: usize,
}

impl Regions {
    fn new() -> Regions {
        let none = Region { name: "", start: 0, end: 0, used: Use::Reads };
        Regions { all: [none; MOST_REGIONS], count: 0 }
    }

    fn push(&mut self, name: &'static str, Range { start, end }: Range<u64>, used: Use) {
        self.all[self.count] = Region { name, start, end, used };
        self.count += 1;
    }

    fn as_slice(&self) -> &[Region] {
        &self.all[..self.count]
    }

    /// Checks that nothing that is written lies in memory of anything else.
    fn check_apart(&self) -> Result<()> {
        let all = self.as_slice();
        for (index, b) in all.iter().enumerate().rev() {
            for a in &all[..index] {
                let shared = match (a.used, b.used) {
                    (Use::Reads | Use::ReadsBeforeOut, Use::Reads | Use::ReadsBeforeOut) => true,
                    (Use::ReadsBeforeOut, Use::WritesOut) => true,
                    _ => a.end <= b.start || b.end <= a.start,
                };
                if !shared {
                    let found = format!(
                        "{:#x} to {:#x}, which overlaps {} at {:#x} to {:#x}",
                        a.start, a.end, b.name, b.start, b.end
                    );
                    return Err(Error::input(a.name, found, "memory of its own", "Allocate the two apart"));
                }
            }
        }
        Ok(())
    }
}

/// What a call does with its layer.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Purpose {
    /// It computes the output, with heads of these types and precisions.
    Attend(HeadTypes, Precisions),
    /// It profiles the heads, and computes no output.
    Profile,
}

/// Checks the tensors of a call, and what else it reads and writes.
pub(crate) fn check_call(
    device: &Device,
    spec: &Spec,
    shape: TensorShape,
    layer: &Layer,
    purpose: Purpose,
    workspace: u64,
    layout: &WorkspaceLayout,
) -> Result<()> {
    let tensor = |name: &'static str, tensor: &Tensor, shape: TensorShape| -> Result<Range<u64>> {
        check_address(name, tensor.data, shape.element)?;
        shape.bytes(tensor).ok_or_else(|| {
            Error::input(
                format!("{name}, strides"),
                format!("{tensor:?}"),
                "a tensor that ends below 2^64",
                "Strides count elements, not bytes, and are not negative",
            )
        })
    };
    check_text_is_there(spec, layer)?;
    for (name, given, shape) in given_tensors(spec, shape, layer) {
        tensor(name, &given, shape)?;
    }
    let attends = purpose != Purpose::Profile;
    let out = if attends { Some(tensor("out", &layer.out, shape)?) } else { None };
    if attends {
        check_disjoint_rows(&layer.out, shape)?;
    }

    let mut regions = Regions::new();
    let affine = [
        (["q_norm.weight", "q_norm.bias"], Some(layer.q_norm)),
        (["k_norm.weight", "k_norm.bias"], Some(layer.k_norm)),
        (["before.q_norm.weight", "before.q_norm.bias"], layer.before.q_norm),
        (["before.k_norm.weight", "before.k_norm.bias"], layer.before.k_norm),
        (["after.q_norm.weight", "after.q_norm.bias"], layer.after.q_norm),
        (["after.k_norm.weight", "after.k_norm.bias"], layer.after.k_norm),
    ];
    let kind = spec.qk_norm.as_ref().map(|norm| norm.kind);
    for ([weight, bias], weights) in affine {
        let Some(weights) = weights else { continue };
        for (name, address, allowed) in
            [(weight, weights.weight, kind.is_some()), (bias, weights.bias, kind == Some(NormKind::Layer))]
        {
            if address == 0 {
                continue;
            }
            if !allowed {
                return Err(Error::input(
                    name,
                    format!("address {address:#x}"),
                    format!("0: the QK-norm of spec {} has none", spec.name),
                    "Pass 0, or change [qk_norm] in the spec",
                ));
            }
            let words = spec.norm_length(shape.heads).into();
            regions.push(name, words_at(name, address, WIDE, words)?, Use::Reads);
        }
    }
    let tables = rope_elements(spec, shape, layer.rope_batch)?;
    for (name, address) in [("cos", layer.cos), ("sin", layer.sin)] {
        match (spec.rope.is_some(), address) {
            (true, address) => regions.push(name, words_at(name, address, WIDE, tables)?, Use::Reads),
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
            regions.push(name, words_at(name, lengths, WORD, shape.batch.into())?, Use::Reads);
        }
    }
    if layer.precisions != 0 {
        if spec.largest_error.is_none() {
            let what = if spec.compute == Compute::E4m3 { "in 8 bits" } else { "the type of the tensors" };
            return Err(Error::input(
                "precisions",
                format!("address {:#x}", layer.precisions),
                format!("0: all heads of spec {} multiply {what}", spec.name),
                "Pass 0, or write compute = \"e4m3\" and [precision] in the spec",
            ));
        }
        // Those that an earlier call left in the workspace may stay there.
        if layer.precisions != workspace + layout.precisions.start {
            regions.push("precisions", words_at("precisions", layer.precisions, WORD, all_heads)?, Use::Reads);
        }
    }
    if let Purpose::Attend(HeadTypes::Given(address), _) = purpose {
        // The types that an earlier call left in the workspace may stay there.
        if address != workspace + layout.head_types.start {
            regions.push("head types", words_at("head types", address, WORD, all_heads)?, Use::Reads);
        }
    }
    for (name, given, shape) in given_tensors(spec, shape, layer) {
        // Heads in 16 bits are packed when those in 8 bits are done.
        let used = match purpose {
            Purpose::Attend(_, Precisions::Given(_) | Precisions::Found(_)) => Use::Reads,
            _ => Use::ReadsBeforeOut,
        };
        regions.push(name, tensor(name, &given, shape)?, used);
    }
    let profiles = matches!(purpose, Purpose::Profile | Purpose::Attend(HeadTypes::Profiled, _));
    let judges = matches!(purpose, Purpose::Attend(_, Precisions::Found(_)));
    let types = ("this call does not profile", "Pass 0, or profile the heads");
    let precisions = (
        "this call finds no precisions",
        "Pass 0, or profile the heads with [precision] in the spec, and give no precisions",
    );
    let found = [
        ("found.head_types", layer.found.head_types, 1, profiles, types),
        ("found.errors", layer.found.errors, CANDIDATES, profiles, types),
        ("found.precisions", layer.found.precisions, 1, judges, precisions),
        ("found.precision_errors", layer.found.precision_errors, 1, judges, precisions),
    ];
    for (name, address, words, is_found, (reason, mend)) in found {
        if address == 0 {
            continue;
        }
        if !is_found {
            return Err(Error::input(name, format!("address {address:#x}"), format!("0: {reason}"), mend));
        }
        regions.push(name, words_at(name, address, WORD, all_heads * words)?, Use::Writes);
    }
    if attends && layer.lse != 0 {
        let rows = all_heads * u64::from(shape.rows);
        regions.push("lse", words_at("lse", layer.lse, WORD, rows)?, Use::Writes);
    }
    if let Some(out) = out {
        regions.push("out", out, Use::WritesOut);
    }
    regions.push("workspace", workspace..workspace + layout.bytes, Use::Writes);
    regions.check_apart()?;
    device.check_memory(regions.as_slice().iter().map(|region| (region.name, region.start)))
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

/// The range of `words` 4-byte words at an address, which must be aligned.
fn words_at(name: &str, address: u64, alignment: u64, words: u64) -> Result<Range<u64>> {
    check_address(name, address, alignment)?;
    range_at(name, address, words * WORD)
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

/// Checks that no element of `out` has two indices. In the order of their strides, each dimension
/// must step over all before it.
fn check_disjoint_rows(out: &Tensor, shape: TensorShape) -> Result<()> {
    let mut dimensions = shape.dimensions(out);
    dimensions.sort_unstable_by_key(|&(_, stride)| stride);
    let mut extent = u64::from(shape.head_dim);
    for (count, stride) in dimensions.into_iter().filter(|&(count, _)| count > 1) {
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
