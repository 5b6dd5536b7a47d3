//! Packed rows as the kernel pack leaves them, compared with the reference.

use std::collections::BTreeSet;
use std::ops::Range;

use framestride::device::Buffer;
use framestride::shapes::blocks::VALUES_UNITS;
use framestride::shapes::image::e4m3::{
    CENTER_COUNTED, CENTER_FACTOR, CENTER_FLOATS, CENTER_LOST, LOST_SCALE, UNIT_KEYS,
};
use framestride::shapes::image::{self, ATOM_ROWS, CHUNK_BYTES, Image};
use framestride::shapes::layout::{PAD_ROWS, ValidText};
use framestride::shapes::spec::{NormKind, Spec};
use framestride::{Device, Result};
use rand::{Rng, RngExt};
use rayon::prelude::*;

use crate::checks::{Worst, row_error};
use crate::compute_type::{ComputeType, e4m3};
use crate::reference::{Center, Operand, Reference, distance, norm};
use crate::tensors::{Inputs, widen};
use crate::tolerance;

/// Groups of packed rows that are drawn from a head that is not compared whole.
const PACKED_GROUPS: usize = 4;

/// Rows of one packed head, padding included.
pub fn packed_rows(sequence: usize) -> usize {
    sequence.next_multiple_of(ATOM_ROWS as usize) + PAD_ROWS as usize
}

/// A head of one batch item.
#[derive(Clone, Copy)]
pub struct HeadIndex {
    pub item: usize,
    pub head: usize,
}

impl HeadIndex {
    /// What reports call it.
    pub fn name(self) -> String {
        format!("batch {}, head {}", self.item, self.head)
    }

    /// What reports call a row of it.
    pub fn row(self, row: usize) -> String {
        format!("batch {}, head {}, row {row}", self.item, self.head)
    }
}

/// One head as it must lie in the packed images.
pub struct PackedHead<'a> {
    pub reference: &'a Reference<'a>,
    pub spec: &'a Spec,
    pub inputs: &'a Inputs,
    pub index: HeadIndex,
    pub valid: ValidText,
    /// What it was packed for.
    pub compute: ComputeType,
    /// The center of V as the device has it, for attention in 8 bits.
    pub center: Option<DeviceCenter>,
    /// The model's row of each packed row, of Q, K and V.
    pub order: [&'a [usize]; 3],
}

/// A center of V as the device has it.
pub struct DeviceCenter {
    mean: Vec<f32>,
    factor: f32,
    /// One over the factor.
    inverse: f32,
    /// The largest value, times the factor, of which is counted what rounding took.
    counted: f32,
    /// What rounding took from each channel of all keys together, times the factor.
    lost: Vec<f64>,
}

impl DeviceCenter {
    /// Bytes of one.
    pub const BYTES: u64 = CENTER_FLOATS as u64 * 4;

    pub fn new(bytes: &[u8]) -> DeviceCenter {
        let words: &[[u8; 4]] = bytes.as_chunks().0;
        let float = |word: &[u8; 4]| f32::from_le_bytes(*word);
        let (mean, rest) = words.split_at(CENTER_FACTOR as usize);
        let lost = words[CENTER_LOST as usize..].iter().map(|&word| f64::from(i32::from_le_bytes(word)));
        DeviceCenter {
            mean: mean.iter().map(float).collect(),
            factor: float(&rest[0]),
            inverse: float(&rest[1]),
            counted: float(&words[CENTER_COUNTED as usize]),
            lost: lost.map(|lost| lost / f64::from(LOST_SCALE)).collect(),
        }
    }

    /// What is added to every output, where so many keys are seen by somebody.
    pub fn added(&self, live: usize) -> Vec<f64> {
        let share = 1.0 / (f64::from(self.factor) * live as f64);
        self.mean.iter().zip(&self.lost).map(|(&mean, lost)| f64::from(mean) + lost * share).collect()
    }

    /// Compares it with the center of `values`. The error of the mean is relative to the size of
    /// the values.
    pub fn compare(
        &self,
        spec: &Spec,
        valid: ValidText,
        values: &[f64],
        location: impl FnOnce() -> String,
        worst: &mut Worst,
    ) {
        let expected = Center::new(&spec.layout, valid, values, self.mean.len());
        let found: Vec<f64> = self.mean.iter().map(|&x| x.into()).collect();
        let size = norm(values) / (values.len() as f64 / self.mean.len() as f64).sqrt();
        // Size and largest are off by as much as the mean is, and may lie that near to a power of
        // two.
        let off = tolerance::center() * (size + expected.size);
        let powers = |size_sign: f64, most_sign: f64| {
            Center::powers((expected.size + size_sign * off).max(0.0), (expected.most + most_sign * off).max(0.0))
        };
        let [factor, inverse, counted] = [self.factor, self.inverse, self.counted].map(f64::from);
        let is_within = (powers(1.0, 1.0)[0]..=powers(-1.0, -1.0)[0]).contains(&factor)
            && (powers(-1.0, 1.0)[1]..=powers(1.0, -1.0)[1]).contains(&counted);
        let are_powers = [factor, counted].iter().all(|power| power.log2().fract() == 0.0);
        let error = match is_within && are_powers && factor * inverse == 1.0 {
            true => distance(&found, &expected.mean) / size.max(f64::MIN_POSITIVE),
            false => f64::INFINITY,
        };
        worst.add(error, tolerance::center(), location);
    }
}

impl PackedHead<'_> {
    /// Rows of the head, padding included.
    pub fn rows(&self) -> usize {
        packed_rows(self.order[0].len())
    }

    /// Rows that lie together in memory, of Q, K and V alike.
    fn group(&self) -> usize {
        match self.compute {
            ComputeType::Bf16 | ComputeType::F16 => ATOM_ROWS as usize,
            ComputeType::E4m3 => UNIT_KEYS as usize,
        }
    }

    /// Rows of an image of the head, which are whole groups.
    pub fn image_rows(&self) -> usize {
        self.rows().next_multiple_of(self.group())
    }

    /// Bytes of a row, or of all channels of a key.
    pub fn row_bytes(&self) -> usize {
        self.spec.head_dim as usize * self.compute.bytes()
    }

    /// Number of packed rows that are neither padding nor invalid text. They come first.
    pub fn live(&self) -> usize {
        (self.valid.sum() + self.spec.layout.frames.value * self.spec.layout.tokens_per_frame.value) as usize
    }

    /// The bytes of some rows of the head, which is number `index` of the images at `start` in the
    /// workspace. `rows` are whole groups.
    pub fn read(
        &self,
        device: &Device,
        workspace: &Buffer,
        start: u64,
        index: usize,
        rows: Range<usize>,
    ) -> Result<Vec<u8>> {
        let bytes = |rows: usize| (rows * self.row_bytes()) as u64;
        let place = match self.compute {
            ComputeType::Bf16 | ComputeType::F16 => bytes(self.rows()),
            ComputeType::E4m3 => bytes(self.spec.e4m3_image_rows() as usize),
        };
        device.read(workspace, start + index as u64 * place + bytes(rows.start), bytes(rows.len()))
    }

    /// Ranges of packed rows to compare, in whole groups.
    ///
    /// A whole head has one range with all rows. Another has some groups at random, the ends of
    /// both sides' text, the end of the sink frames, and everything from the last row that counts.
    pub fn draw_pieces(&self, is_whole: bool, generator: &mut impl Rng) -> Vec<Range<usize>> {
        let (layout, group) = (&self.spec.layout, self.group());
        let tail = if is_whole { 0 } else { self.live().saturating_sub(1) / group };
        let (before, text) = (self.valid.before as usize, self.valid.sum() as usize);
        let sinks = text + (layout.sink_frames * layout.tokens_per_frame.value) as usize;
        let mut groups: BTreeSet<usize> = (0..PACKED_GROUPS).map(|_| generator.random_range(0..=tail)).collect();
        groups.extend(
            [0, before.saturating_sub(1), before, text.saturating_sub(1), text, sinks.saturating_sub(1), sinks]
                .map(|row| row / group),
        );
        let pieces = groups.into_iter().filter(|&start| start < tail).map(|start| start * group..(start + 1) * group);
        pieces.chain(std::iter::once(tail * group..self.image_rows())).collect()
    }

    /// Compares packed rows of one operand from row `first`, which begins a group. Padding and
    /// invalid text must be zero.
    pub fn compare(&self, operand: usize, first: usize, bytes: &[u8]) -> Worst {
        let dim = self.spec.head_dim as usize;
        let group = self.group();
        bytes
            .par_chunks_exact(group * self.row_bytes())
            .enumerate()
            .with_min_len(4)
            .map_init(
                || vec![0.0; dim],
                |found, (index, bytes)| {
                    let mut worst = Worst::new();
                    let start = first + index * group;
                    // Nobody reads what a last group has beyond the padding.
                    for row in 0..group.min(self.rows() - start) {
                        self.decode(operand, bytes, row, found);
                        self.compare_row(operand, start + row, found, &mut worst);
                    }
                    worst
                },
            )
            .reduce(Worst::new, Worst::merge)
    }

    fn compare_row(&self, operand: usize, packed: usize, found: &[f64], worst: &mut Worst) {
        let index = self.index;
        let Some(&row) = self.order[operand][..self.live()].get(packed) else {
            let error = if found.iter().all(|&x| x == 0.0) { 0.0 } else { f64::INFINITY };
            return worst.add(error, 0.0, || format!("{} of the packed head, beyond what is valid", index.row(packed)));
        };
        self.compare_token(operand, row, found, worst);
    }

    /// Compares the sampled rows of packed Q, which are `rows` of the model's order, and puts them
    /// without their scale where they belong in `queries`, `[rows, head_dim]` in the model's order.
    pub fn compare_samples(&self, rows: &[usize], image: &[u8], queries: &mut [f64], worst: &mut Worst) {
        let (dim, group) = (self.spec.head_dim as usize, ATOM_ROWS as usize);
        for (atoms, rows) in image.chunks_exact(group * self.row_bytes()).zip(rows.chunks_exact(group)) {
            for (place, &row) in rows.iter().enumerate() {
                let found = &mut queries[row * dim..][..dim];
                self.decode(0, atoms, place, found);
                self.compare_token(0, row, found, worst);
                found.iter_mut().for_each(|x| *x /= self.inputs.query_scale());
            }
        }
    }

    /// Compares what was packed of a row of the model's order.
    fn compare_token(&self, operand: usize, row: usize, found: &[f64], worst: &mut Worst) {
        let (spec, index) = (self.spec, self.index);
        let transformed = |operand| self.compute.transformed(&self.reference.row(operand, index.item, row, index.head));
        let (tokens, expected) = match operand {
            0 => {
                let mut expected = transformed(Operand::Query);
                expected.iter_mut().for_each(|x| *x *= self.inputs.query_scale());
                (&self.inputs.q, expected)
            }
            1 => (&self.inputs.k, transformed(Operand::Key)),
            _ => (&self.inputs.v, self.value_row(row)),
        };
        let rounded: Vec<f64> = expected.iter().map(|&x| self.compute.round(x)).collect();
        // What is rounded of V is known, and so is that of K in a model without norm and RoPE.
        let is_plain = spec.qk_norm.is_none() && spec.rope.is_none() && self.compute != ComputeType::E4m3;
        let tolerance = if operand == 2 || (operand == 1 && is_plain) {
            0.0
        } else {
            // The elements that the statistic was taken over.
            let heads = if spec.norm_is_over_heads() { 0..tokens.heads } else { index.head..index.head + 1 };
            let input: Vec<f64> = match spec.qk_norm.as_ref().map(|norm| norm.kind) {
                Some(NormKind::Layer) => heads.flat_map(|head| tokens.row(index.item, row, head)).collect(),
                // Other tolerances do not depend on the elements.
                Some(NormKind::Rms) | None => Vec::new(),
            };
            tolerance::packed_row(spec, self.compute, &input, &expected)
        };
        worst.add(row_error(found, &rounded), tolerance, || index.row(row));
    }

    /// Compares what rounding took from V with what it takes from the reference's rows, relative to
    /// the size of the image. Each warp's units of keys from which it takes something lose less
    /// than one step of the device's count.
    pub fn compare_lost(&self, center: &DeviceCenter, worst: &mut Worst) {
        let mut expected = vec![0.0; center.lost.len()];
        let (mut square, mut warps) = (0.0, 0.0);
        for keys in self.order[2][..self.live()].chunks((UNIT_KEYS * VALUES_UNITS) as usize) {
            let mut takes = false;
            for &row in keys {
                for (expected, x) in expected.iter_mut().zip(self.value_row(row)) {
                    let taken = x - self.compute.round(x);
                    if x.abs() <= f64::from(center.counted) {
                        *expected += taken;
                        takes |= taken != 0.0;
                    }
                    square += x * x;
                }
            }
            warps += f64::from(u8::from(takes));
        }
        let size = f64::sqrt(square).max(f64::MIN_POSITIVE);
        let tolerance = warps / f64::from(LOST_SCALE) * (expected.len() as f64).sqrt() / size;
        worst.add(distance(&center.lost, &expected) / size, tolerance, || self.index.name());
    }

    /// A row of V as it is rounded for its image.
    fn value_row(&self, row: usize) -> Vec<f64> {
        let values = self.inputs.v.row(self.index.item, row, self.index.head);
        let Some(DeviceCenter { mean, factor, .. }) = &self.center else { return values };
        values.into_iter().zip(mean).map(|(x, mean)| ((x as f32 - mean) * factor).into()).collect()
    }

    /// The whole image of Q (`operand` 0) or V (2), without its scale or factor, or K (1) as
    /// numbers, `[rows, head_dim]` in the model's order. Rows of Q and K stay
    /// [transformed](ComputeType::transformed).
    pub fn unpack(&self, operand: usize, image: &[u8]) -> Vec<f64> {
        let (dim, order) = (self.spec.head_dim as usize, self.order[operand]);
        let mut packed_of = vec![0; order.len()];
        for (packed, &row) in order.iter().enumerate() {
            packed_of[row] = packed;
        }
        let (group, group_bytes) = (self.group(), self.group() * self.row_bytes());
        let factor = match operand {
            0 => self.inputs.query_scale(),
            1 => 1.0,
            _ => self.center.as_ref().map_or(1.0, |center| center.factor.into()),
        };
        let mut rows = vec![0.0; order.len() * dim];
        rows.par_chunks_exact_mut(dim).zip(&packed_of).with_min_len(64).for_each(|(values, &packed)| {
            let bytes = &image[packed / group * group_bytes..][..group_bytes];
            self.decode(operand, bytes, packed % group, values);
            values.iter_mut().for_each(|x| *x /= factor);
        });
        rows
    }

    /// Reads one row of a group of packed rows, which are an image of their own.
    fn decode(&self, operand: usize, group: &[u8], row: usize, values: &mut [f64]) {
        match (self.compute, operand) {
            (ComputeType::E4m3, 2) => decode_key(group, row, values),
            (ComputeType::E4m3, _) => decode_e4m3(group, row, values),
            _ => decode(self.spec.image(), group, row, values),
        }
    }
}

/// Reads the values of one key of a unit of V in 8 bits.
fn decode_key(unit: &[u8], key: usize, values: &mut [f64]) {
    for (channel, value) in values.iter_mut().enumerate() {
        *value = e4m3(unit[image::e4m3::value(key as u32, channel as u32) as usize]);
    }
}

/// Reads one row of a group of Q or K in 8 bits.
fn decode_e4m3(group: &[u8], row: usize, values: &mut [f64]) {
    for (chunk, values) in values.chunks_exact_mut(CHUNK_BYTES as usize).enumerate() {
        let start = image::e4m3::chunk(row as u32, chunk as u32) as usize;
        for (value, &byte) in values.iter_mut().zip(&group[start..]) {
            *value = e4m3(byte);
        }
    }
}

/// Reads one row of a group of [`ATOM_ROWS`] packed rows, which are an image of their own.
fn decode(image: Image, group: &[u8], row: usize, values: &mut [f64]) {
    for (chunk, values) in values.chunks_exact_mut(image.chunk_elements() as usize).enumerate() {
        let start = image.chunk(row as u32, chunk as u32) as usize;
        for (value, &bytes) in values.iter_mut().zip(group[start..][..CHUNK_BYTES as usize].as_chunks().0) {
            *value = widen(image.dtype, u16::from_le_bytes(bytes));
        }
    }
}
