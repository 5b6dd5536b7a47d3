//! Tensors in safetensors files.
//!
//! | tensor | diffusers calls it | shape | type |
//! | --- | --- | --- | --- |
//! | `q`, `k`, `v` | `query`, ... | \[B, S, H, D\], \[B, H, S, D\], \[B, S, H D\] | floats |
//! | `cos`, `sin` | `freqs_cos`, `freqs_sin` | \[rows, C / 2\], \[rows, H, C / 2\] | floats |
//! | `q_norm.weight`, `q_norm.bias` | `norm_q.weight`, ... | \[D\], \[H D\] | floats |
//! | `k_norm.weight`, `k_norm.bias` | `norm_k.weight`, ... | \[D\], \[H D\] | floats |
//! | `q_text`, `k_text`, `v_text` | `encoder_query`, ... | as `q`, of the text | floats |
//! | `q_norm_text.weight`, ... | `norm_added_q.weight`, ... | \[D\], \[H D\] | floats |
//! | `text_lengths` | | \[B\], or \[\] for one batch item | integers |
//!
//! Where a spec has text on both sides of the video, names have `before` and `after` in place of
//! `text`, and diffusers has no name for either.
//!
//! Text that is projected apart may have tensors of its own, all three of Q, K and V. Then `q`, `k`
//! and `v` have the other rows, and the kernels get the tensors as they are, which is apart.
//!
//! Q, K and V are rounded to the spec's type. RoPE tables are of the C channels that are rotated,
//! `rope.channels`. They have an extent of heads where each head has its own, and \[B\] before all
//! others where each batch item has its own. They are made from the grid when they are not given.
//! Norm weights are \[H D\] when
//! the norm is over all heads. Text rows have the video's weights when their own are not given.
//! `text_lengths` are numbers of valid text tokens.
//!
//! Floats are bf16, f16, f32 or f64. A finite number that its new type cannot hold is an error. So
//! is a tensor of any other name, since nobody would read it.
//!
//! Norms of diffusers may have the path of their layer before their names, as in
//! `transformer_blocks.0.attn.norm_q.weight`. It must be the path of self-attention, which is
//! `attn` or `attn1`. Tables of diffusers say each number twice, for both channels of a pair:
//! \[rows, C\], or \[rows, H C\] with tables per head. They are taken when both numbers are equal
//! for the pairs of the spec. Extents of 1 do not count.
//!
//! The output is written as `out`, \[B, S, H, D\] in the spec's type, with `lse`, \[B, H, S\].

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use framestride::call::check_heads;
use framestride::device::available_memory;
use framestride::shapes::spec::{Dtype, Spec};
use framestride::shapes::text::nearest;
use framestride::{Error, Result};
use framestride_check::rope::{RopeTables, paired};
use framestride_check::tensors::{Inputs, Norm, Text, Tokens, narrow, widen};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors};

use crate::output::Output;

/// A tensor's name, and what diffusers calls it.
type Names = (&'static str, &'static str);

/// The tensors of the rows.
const OPERANDS: [&str; 3] = ["q", "k", "v"];

/// The names of a layer's tensors, but for those of text.
const LAYER: [Names; 9] = [
    ("q", "query"),
    ("k", "key"),
    ("v", "value"),
    ("cos", "freqs_cos"),
    ("sin", "freqs_sin"),
    ("q_norm.weight", "norm_q.weight"),
    ("q_norm.bias", "norm_q.bias"),
    ("k_norm.weight", "norm_k.weight"),
    ("k_norm.bias", "norm_k.bias"),
];

/// The names of text on one side of the video alone.
const TEXT: [Names; 8] = [
    ("q_text", "encoder_query"),
    ("k_text", "encoder_key"),
    ("v_text", "encoder_value"),
    ("q_norm_text.weight", "norm_added_q.weight"),
    ("q_norm_text.bias", "norm_added_q.bias"),
    ("k_norm_text.weight", "norm_added_k.weight"),
    ("k_norm_text.bias", "norm_added_k.bias"),
    ("text_lengths", ""),
];

/// The names of text on both sides of the video.
const BOTH_SIDES: [Names; 16] = [
    ("q_before", ""),
    ("k_before", ""),
    ("v_before", ""),
    ("q_norm_before.weight", ""),
    ("q_norm_before.bias", ""),
    ("k_norm_before.weight", ""),
    ("k_norm_before.bias", ""),
    ("before_lengths", ""),
    ("q_after", ""),
    ("k_after", ""),
    ("v_after", ""),
    ("q_norm_after.weight", ""),
    ("q_norm_after.bias", ""),
    ("k_norm_after.weight", ""),
    ("k_norm_after.bias", ""),
    ("after_lengths", ""),
];

/// The names of a layer's tensors for a spec.
fn layer_names(spec: &Spec) -> Vec<Names> {
    let text = if Inputs::text_names(&spec.layout).contains(&"text") { &TEXT[..] } else { &BOTH_SIDES };
    [&LAYER, text].concat()
}

/// The names of a video's tensors.
const VIDEO: [Names; 1] = [("frames", "")];

/// The name that this project has for a tensor of a file.
fn known(names: &[Names], found: &str) -> Option<&'static str> {
    // The path counts, since cross-attention (`attn2`) has norms of the same names.
    let parts: Vec<&str> = found.split('.').collect();
    let in_layer = match parts.iter().rposition(|part| ["attn", "attn1"].contains(part)) {
        Some(layer) => parts[layer + 1..].join("."),
        None => found.to_owned(),
    };
    let theirs = |theirs: &str| in_layer == theirs && (in_layer == found || theirs.starts_with("norm_"));
    let name = names.iter().find(|(ours, other)| *ours == found || (!other.is_empty() && theirs(other)));
    name.map(|&(ours, _)| ours)
}

/// An open file. Every tensor in it has a name that is known here.
struct File<'a> {
    path: &'a Path,
    /// For each name of this project, the name in the file and the tensor.
    tensors: BTreeMap<&'static str, (String, TensorView<'a>)>,
}

/// Bytes of the number that a file starts with. It is the size of the header, which is JSON.
const SIZE_BYTES: usize = 8;

/// The largest header that the format allows.
const HEADER_BYTES: u64 = 100_000_000;

/// The bytes of a file. Where the first ones are those of no safetensors file, only these are read:
/// the rest may have no end.
fn read(path: &Path) -> Result<Vec<u8>> {
    let refuse = |found: String, mend: &str| Error::input(path.display(), found, "a safetensors file", mend);
    let unreadable =
        |error: std::io::Error| refuse(format!("nothing to read ({error})"), "Check the path and its permissions");
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let available = available_memory().unwrap_or(u64::MAX);
    let size = file.metadata().map_err(unreadable)?.len();
    if size > available {
        let found = format!("{size} bytes, more than the {available} of memory that are left");
        return Err(refuse(found, "Free memory, or store one layer alone"));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(SIZE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    let header = bytes.first_chunk().map_or(0, |size| u64::from_le_bytes(*size));
    if header <= HEADER_BYTES && bytes.last() == Some(&b'{') {
        file.read_to_end(&mut bytes).map_err(unreadable)?;
    }
    Ok(bytes)
}

impl<'a> File<'a> {
    fn parse(path: &'a Path, bytes: &'a [u8], names: &[Names]) -> Result<File<'a>> {
        let stored = SafeTensors::deserialize(bytes).map_err(|error| {
            Error::input(
                path.display(),
                format!("what does not parse ({error})"),
                "a whole safetensors file",
                "It is another kind of file, or was cut short: write it again",
            )
        })?;
        let mut all = stored.tensors();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut file = File { path, tensors: BTreeMap::new() };
        for (found, view) in all {
            let Some(name) = known(names, &found) else {
                let mean = nearest(&found, names.iter().flat_map(|&(ours, theirs)| [ours, theirs]));
                return Err(Error::input(
                    file.subject(&found),
                    "a name that nobody reads",
                    names.iter().map(|(ours, _)| *ours).collect::<Vec<_>>().join(", "),
                    mean.map_or(
                        "Drop it, or store it under one of these names; scale and dense heads are options of `framestride run`"
                            .into(),
                        |mean| format!("Did you mean {mean}?"),
                    ),
                ));
            };
            if let Some((first, _)) = file.tensors.get(name) {
                return Err(Error::input(
                    file.subject(&found),
                    format!("{name} again, which {first} is too"),
                    "each tensor once",
                    "Store the tensors of one layer",
                ));
            }
            file.tensors.insert(name, (found, view));
        }
        Ok(file)
    }

    /// What errors call a tensor. It is the tensor's name in the file, where the file has it.
    fn subject(&self, name: &str) -> String {
        let found = self.tensors.get(name).map_or(name, |(found, _)| found);
        format!("{}, tensor {found}", self.path.display())
    }

    fn find(&self, name: &str) -> Option<&TensorView<'a>> {
        self.tensors.get(name).map(|(_, view)| view)
    }

    fn need(&self, name: &str) -> Result<&TensorView<'a>> {
        self.find(name).ok_or_else(|| {
            let found: Vec<&str> = self.tensors.values().map(|(found, _)| found.as_str()).collect();
            Error::input(
                self.subject(name),
                format!(
                    "no such tensor; the file has {}",
                    if found.is_empty() { "none".into() } else { found.join(", ") }
                ),
                "a tensor of this name",
                "Store it under this name",
            )
        })
    }

    fn wrong_type(&self, name: &str, found: Stored, allowed: &str) -> Error {
        Error::input(self.subject(name), format!("type {found:?}"), allowed, "Convert it before storing it")
    }

    fn wrong_shape(&self, name: &str, view: &TensorView, allowed: impl std::fmt::Display, mend: &str) -> Error {
        Error::input(self.subject(name), format!("shape {:?}", view.shape()), allowed, mend)
    }

    /// The elements of a tensor of floats, converted by `to`. Their new type holds numbers up to
    /// `limit`, and errors name it `called`.
    fn floats<T: Copy + Send + Sync>(
        &self,
        name: &str,
        view: &TensorView,
        (limit, called): (f64, &str),
        to: impl Fn(f64) -> T + Sync,
        is_finite: impl Fn(T) -> bool + Sync,
    ) -> Result<Vec<T>> {
        let data = view.data();
        let two = |index: usize| u16::from_le_bytes(data.as_chunks().0[index]);
        let value: &(dyn Fn(usize) -> f64 + Sync) = match view.dtype() {
            Stored::F64 => &|index| f64::from_le_bytes(data.as_chunks().0[index]),
            Stored::F32 => &|index| f32::from_le_bytes(data.as_chunks().0[index]).into(),
            Stored::BF16 => &|index| bf16::from_bits(two(index)).into(),
            Stored::F16 => &|index| f16::from_bits(two(index)).into(),
            other => return Err(self.wrong_type(name, other, "BF16, F16, F32 or F64")),
        };
        let count = data.len() * 8 / view.dtype().bitsize();
        let converted: Vec<T> = (0..count).into_par_iter().map(|index| to(value(index))).collect();
        let lost = |index: &usize| !is_finite(converted[*index]) && value(*index).is_finite();
        match (0..count).into_par_iter().find_first(lost) {
            None => Ok(converted),
            Some(index) => Err(Error::input(
                self.subject(name),
                format!("{:?} at {:?}", value(index), indices(index, view.shape())),
                format!("numbers up to {limit:?} in size, the largest that {called} holds"),
                "Scale the tensor down, or have another attention.dtype in the spec; an infinity, if it is meant, is carried",
            )),
        }
    }

    /// The elements of a tensor of floats, as f32.
    fn singles(&self, name: &str, view: &TensorView) -> Result<Vec<f32>> {
        self.floats(name, view, (f32::MAX.into(), "f32"), |value| value as f32, f32::is_finite)
    }

    /// The shape of Q, K or V as [batch, rows, heads, head_dim], and whether the file has heads
    /// before rows.
    fn layer_shape(&self, name: &str, spec: &Spec, rows: u32) -> Result<([usize; 4], bool)> {
        let view = self.need(name)?;
        let (rows, head_dim) = (rows as usize, spec.head_dim as usize);
        let (shape, heads_first) = match *view.shape() {
            [batch, tokens, heads, dim] if dim == head_dim && tokens == rows => {
                // For the names of this project the order is documented. Others may have written
                // either order.
                if heads == rows && self.tensors.get(name).is_some_and(|(found, _)| found != name) {
                    return Err(self.wrong_shape(
                        name,
                        view,
                        "[B, S, H, D] or [B, H, S, D], where S and H differ",
                        &format!("Store it as {name}, in [B, S, H, D]"),
                    ));
                }
                ([batch, rows, heads, dim], false)
            }
            [batch, heads, tokens, dim] if dim == head_dim && tokens == rows => ([batch, rows, heads, dim], true),
            [batch, tokens, channels] if tokens == rows && channels % head_dim == 0 => {
                ([batch, rows, channels / head_dim, head_dim], false)
            }
            _ => {
                let apart = OPERANDS.contains(&name) && rows < spec.layout.sequence() as usize;
                let apart = if apart { ", without the text that has tensors of its own" } else { "" };
                return Err(self.wrong_shape(
                    name,
                    view,
                    format!("[batch, {rows}, heads, {head_dim}] for spec {}{apart}", spec.name),
                    "Store it as [B, S, H, D] in the model's order, or give the spec of this model",
                ));
            }
        };
        check_heads(spec, shape[2], &self.subject(name))?;
        if shape[0] == 0 {
            return Err(self.wrong_shape(name, view, "a batch of 1 or more", "Store at least one batch item"));
        }
        Ok((shape, heads_first))
    }

    fn tokens(&self, name: &str, spec: &Spec, rows: u32) -> Result<Tokens> {
        let (shape @ [batch, rows, heads, head_dim], heads_first) = self.layer_shape(name, spec, rows)?;
        let view = self.need(name)?;
        let dtype = spec.dtype;
        let bits: Vec<u16> = match (view.dtype(), dtype) {
            (Stored::BF16, Dtype::Bf16) | (Stored::F16, Dtype::F16) => {
                view.data().as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect()
            }
            _ => {
                let limit = dtype.largest().into();
                let to = |value| narrow(dtype, value);
                self.floats(name, view, (limit, dtype.as_str()), to, |bits| widen(dtype, bits).is_finite())?
            }
        };
        if !heads_first {
            return Ok(Tokens { dtype, batch, rows, heads, head_dim, bits });
        }
        let mut tokens = Tokens::zeros(dtype, shape);
        tokens.bits.par_chunks_exact_mut(head_dim).enumerate().for_each(|(row, to)| {
            let (token, head) = (row / heads, row % heads);
            let from = (token / rows * heads + head) * rows + token % rows;
            to.copy_from_slice(&bits[from * head_dim..][..head_dim]);
        });
        Ok(tokens)
    }

    fn norm(&self, name: &str) -> Result<Option<Norm>> {
        let part = |part: &str| -> Result<Option<Vec<f32>>> {
            let name = format!("{name}.{part}");
            self.find(&name).map(|view| self.singles(&name, view)).transpose()
        };
        let norm = Norm { weight: part("weight")?, bias: part("bias")? };
        Ok((norm != Norm::default()).then_some(norm))
    }

    /// RoPE tables, with one number for each pair of channels, and how many tables there are: one
    /// for each of `batch` items, or one for all.
    fn tables(&self, name: &str, spec: &Spec, batch: usize, heads: usize) -> Result<Option<(usize, Vec<f32>)>> {
        let Some(view) = self.find(name) else { return Ok(None) };
        let Some(rope) = &spec.rope else { return self.singles(name, view).map(|table| Some((1, table))) };
        let shape: Vec<usize> = spec.rope_table_shape(heads as u32).into_iter().map(|extent| extent as usize).collect();
        let (rows, rotated) = (shape[0], rope.channels as usize);
        let is = |items: usize, shape: &[usize]| extents(view.shape()).eq(extents(&[&[items], shape].concat()));
        let is_twice = |items: usize| match rope.per_head {
            true => is(items, &[rows, heads, rotated]) || is(items, &[rows, heads * rotated]),
            false => is(items, &[rows, rotated]),
        };
        if let Some(items) = [1, batch].into_iter().find(|&items| is(items, &shape)) {
            return self.singles(name, view).map(|table| Some((items, table)));
        }
        let Some(items) = [1, batch].into_iter().find(|&items| is_twice(items)) else {
            let each = if batch > 1 { format!(", or {batch} of them") } else { String::new() };
            let mend = "The rows are the video rows, and those of text that the spec's rope rotates too; one table a head with rope.per_head = true";
            return Err(self.wrong_shape(name, view, format!("shape {shape:?}{each}"), mend));
        };
        let channels = self.singles(name, view)?;
        let half = rotated / 2;
        let mut table = Vec::with_capacity(channels.len() / 2);
        for (row, channels) in channels.chunks_exact(rotated).enumerate() {
            for (a, b) in (0..half).map(|pair| paired(rope.pairs, pair, half)) {
                if channels[a].to_bits() != channels[b].to_bits() {
                    let pairs = rope.pairs.as_str();
                    return Err(Error::input(
                        self.subject(name),
                        format!("{} and {} for channels {a} and {b} of row {row}", channels[a], channels[b]),
                        format!("one number for both, which rotate together with rope.pairs = {pairs:?}"),
                        format!("Store shape {shape:?}, or change rope.pairs in the spec"),
                    ));
                }
                table.push(channels[a]);
            }
        }
        Ok(Some((items, table)))
    }

    fn lengths(&self, name: &str, spec: &Spec, most: u32, batch: usize) -> Result<Option<Vec<u32>>> {
        let Some(view) = self.find(name) else { return Ok(None) };
        let data = view.data();
        macro_rules! integers {
            ($type:ty) => {
                data.as_chunks().0.iter().map(|&bytes| <$type>::from_le_bytes(bytes).into()).collect()
            };
        }
        let values: Vec<i128> = match view.dtype() {
            Stored::U8 => integers!(u8),
            Stored::I8 => integers!(i8),
            Stored::U16 => integers!(u16),
            Stored::I16 => integers!(i16),
            Stored::U32 => integers!(u32),
            Stored::I32 => integers!(i32),
            Stored::U64 => integers!(u64),
            Stored::I64 => integers!(i64),
            other => return Err(self.wrong_type(name, other, "an integer type")),
        };
        if !extents(view.shape()).eq(extents(&[batch])) {
            return Err(self.wrong_shape(
                name,
                view,
                format!("shape [{batch}]"),
                "Store one length for each batch item",
            ));
        }
        let length = |(index, &value): (usize, &i128)| {
            u32::try_from(value).ok().filter(|&length| length <= most).ok_or_else(|| {
                Error::input(
                    self.subject(name),
                    format!("{value} at {:?}", indices(index, view.shape())),
                    format!("0 to {most}, the text tokens there of spec {}", spec.name),
                    "A length counts the valid text tokens of a batch item, which come first among the text",
                )
            })
        };
        values.iter().enumerate().map(length).collect::<Result<_>>().map(Some)
    }
}

/// The extents of a shape that are not 1.
fn extents(shape: &[usize]) -> impl Iterator<Item = usize> {
    shape.iter().copied().filter(|&extent| extent != 1)
}

/// The indices of an element along each axis.
fn indices(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut indices: Vec<usize> = shape.iter().rev().map(|extent| (index % extent, index /= extent).0).collect();
    indices.reverse();
    indices
}

/// Reads Q, K, V and what else the file gives, and checks all of it against the spec.
///
/// RoPE tables come from the grid when the file has none. Nothing is allocated that the file's own
/// bytes do not account for.
pub fn load_inputs(path: &Path, spec: &Spec) -> Result<Inputs> {
    let bytes = read(path)?;
    let file = File::parse(path, &bytes, &layer_names(spec))?;
    let [before, after] = Inputs::text_names(&spec.layout);
    let sides = [(before, spec.layout.before), (after, spec.layout.after)];
    // Text is apart when any of its tensors is there. The others are missed then.
    let names = |side: &str| OPERANDS.map(|operand| format!("{operand}_{side}"));
    let is_apart = sides.map(|(side, _)| names(side).iter().any(|name| file.find(name).is_some()));
    let apart = [0, 1].map(|side| if is_apart[side] { sides[side].1 } else { 0 });
    let joined = spec.layout.sequence() - apart[0] - apart[1];
    // In the model's order.
    let groups: Vec<([String; 3], u32)> = [
        is_apart[0].then(|| (names(before), apart[0])),
        Some((OPERANDS.map(String::from), joined)),
        is_apart[1].then(|| (names(after), apart[1])),
    ]
    .into_iter()
    .flatten()
    .collect();
    let ([batch, _, heads, _], _) = file.layer_shape("q", spec, joined)?;
    for (name, rows) in groups.iter().flat_map(|(names, rows)| names.iter().map(move |name| (name, *rows))) {
        let (shape, _) = file.layer_shape(name, spec, rows)?;
        if (shape[0], shape[2]) != (batch, heads) {
            return Err(file.wrong_shape(
                name,
                file.need(name)?,
                format!("a batch of {batch} and {heads} heads, as q has"),
                "Store the tensors of one layer",
            ));
        }
    }
    let tokens = |operand: usize| -> Result<Tokens> {
        groups.iter().map(|(names, rows)| file.tokens(&names[operand], spec, *rows)).collect::<Result<_>>().map(join)
    };
    let tables = (file.tables("cos", spec, batch, heads)?, file.tables("sin", spec, batch, heads)?);
    let text = |side: usize| -> Result<Text> {
        let (name, tokens) = sides[side];
        Ok(Text {
            is_apart: is_apart[side],
            lengths: file.lengths(&format!("{name}_lengths"), spec, tokens, batch)?,
            q_norm: file.norm(&format!("q_norm_{name}"))?,
            k_norm: file.norm(&format!("k_norm_{name}"))?,
        })
    };
    let inputs = Inputs {
        q: tokens(0)?,
        k: tokens(1)?,
        v: tokens(2)?,
        q_norm: file.norm("q_norm")?.unwrap_or_default(),
        k_norm: file.norm("k_norm")?.unwrap_or_default(),
        before: text(0)?,
        after: text(1)?,
        rope: match tables {
            (Some((items, cos)), Some((other, sin))) if items == other => Some(RopeTables { items, cos, sin }),
            (Some((items, _)), Some((other, _))) => {
                return Err(Error::input(
                    file.subject("sin"),
                    format!("{other} tables, and {items} in cos"),
                    "as many of each",
                    "Store both tables once, or both for each batch item",
                ));
            }
            (None, None) => spec.rope.as_ref().map(|_| RopeTables::from_grid(spec, heads)),
            (Some(_), None) => return Err(only_one(&file, "sin", "cos")),
            (None, Some(_)) => return Err(only_one(&file, "cos", "sin")),
        },
        scale: None,
    };
    inputs.check(spec, &path.display().to_string())?;
    Ok(inputs)
}

/// The rows of several tensors in one. They have as many items and heads.
fn join(parts: Vec<Tokens>) -> Tokens {
    let parts = match <[Tokens; 1]>::try_from(parts) {
        Ok([whole]) => return whole,
        Err(parts) => parts,
    };
    let Tokens { dtype, batch, heads, head_dim, .. } = parts[0];
    let rows = parts.iter().map(|part| part.rows).sum();
    let mut bits = Vec::with_capacity(batch * rows * heads * head_dim);
    for item in 0..batch {
        for part in &parts {
            bits.extend_from_slice(&part.bits[part.index(item, 0, 0)..][..part.rows * heads * head_dim]);
        }
    }
    Tokens { dtype, batch, rows, heads, head_dim, bits }
}

fn only_one(file: &File, missing: &str, given: &str) -> Error {
    Error::input(file.subject(missing), format!("only {given}"), "both tables or neither", "Store the other table too")
}

/// The frames of a video: `[frames, height, width]` RGB pixels.
pub struct Frames {
    /// Number of frames.
    pub count: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// The bytes of all pixels: red, green, blue.
    pub pixels: Vec<u8>,
}

/// Reads the tensor `frames`, u8 \[frames, height, width, 3\].
pub fn load_frames(path: &Path) -> Result<Frames> {
    let bytes = read(path)?;
    let file = File::parse(path, &bytes, &VIDEO)?;
    let view = file.need("frames")?;
    if view.dtype() != Stored::U8 {
        return Err(file.wrong_type("frames", view.dtype(), "U8"));
    }
    match *view.shape() {
        [count, height, width, 3] if !view.data().is_empty() => {
            Ok(Frames { count, height, width, pixels: view.data().to_vec() })
        }
        _ => Err(file.wrong_shape(
            "frames",
            view,
            "[frames, height, width, 3], none of them 0",
            "Store RGB frames, one behind the other",
        )),
    }
}

/// Writes `out`, and `lse`, \[B, H, S\], where there is one.
pub fn save_output(to: &Output, out: &Tokens, lse: Option<&[f32]>) -> Result<()> {
    let dtype = match out.dtype {
        Dtype::Bf16 => Stored::BF16,
        Dtype::F16 => Stored::F16,
    };
    let out_bytes: Vec<u8> = out.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let lse_bytes: Vec<u8> = lse.unwrap_or_default().iter().flat_map(|value| value.to_le_bytes()).collect();
    let invalid = |error| Error::file(to.path(), std::io::Error::other(error));
    let mut tensors = vec![("out", TensorView::new(dtype, out.shape().to_vec(), &out_bytes).map_err(invalid)?)];
    if lse.is_some() {
        let shape = vec![out.batch, out.heads, out.rows];
        tensors.push(("lse", TensorView::new(Stored::F32, shape, &lse_bytes).map_err(invalid)?));
    }
    let bytes = safetensors::serialize(tensors, None).map_err(invalid)?;
    to.write(&bytes)
}
