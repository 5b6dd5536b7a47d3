//! Packed rows as the kernel pack leaves them, compared with the reference.

use std::collections::BTreeSet;
use std::ops::Range;

use framestride::shapes::image::{ATOM_ROWS, CHUNK_BYTES, Image};
use framestride::shapes::layout::{PAD_ROWS, ValidText};
use framestride::shapes::spec::{NormKind, Spec};
use rand::{Rng, RngExt};
use rayon::prelude::*;

use crate::checks::{Worst, row_error};
use crate::compute_type::ComputeType;
use crate::reference::{Operand, Reference};
use crate::tensors::{Inputs, widen};
use crate::tolerance;

/// Groups of [`ATOM_ROWS`] packed rows that are drawn from a head that is not compared whole.
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
    /// The model's row of each packed row, of Q, K and V.
    pub order: [&'a [usize]; 3],
}

impl PackedHead<'_> {
    /// Rows of the head, padding included.
    pub fn rows(&self) -> usize {
        packed_rows(self.order[0].len())
    }

    /// Number of packed rows that are neither padding nor invalid text. They come first.
    fn live(&self) -> usize {
        (self.valid.sum() + self.spec.layout.frames.value * self.spec.layout.tokens_per_frame.value) as usize
    }

    /// Ranges of packed rows to compare, in whole groups of [`ATOM_ROWS`].
    ///
    /// A whole head has one range with all rows. Another has some groups at random, the ends of
    /// both sides' text, the end of the sink frames, and everything from the last row that counts.
    pub fn draw_pieces(&self, is_whole: bool, generator: &mut impl Rng) -> Vec<Range<usize>> {
        let (layout, group) = (&self.spec.layout, ATOM_ROWS as usize);
        let tail = if is_whole { 0 } else { self.live().saturating_sub(1) / group };
        let (before, text) = (self.valid.before as usize, self.valid.sum() as usize);
        let sinks = text + (layout.sink_frames * layout.tokens_per_frame.value) as usize;
        let mut groups: BTreeSet<usize> = (0..PACKED_GROUPS).map(|_| generator.random_range(0..=tail)).collect();
        groups.extend(
            [0, before.saturating_sub(1), before, text.saturating_sub(1), text, sinks.saturating_sub(1), sinks]
                .map(|row| row / group),
        );
        let pieces = groups.into_iter().filter(|&start| start < tail).map(|start| start * group..(start + 1) * group);
        pieces.chain(std::iter::once(tail * group..self.rows())).collect()
    }

    /// Compares packed rows of one operand from row `first`, a multiple of [`ATOM_ROWS`]. Padding
    /// and invalid text must be zero.
    pub fn compare(&self, operand: usize, first: usize, bytes: &[u8]) -> Worst {
        let dim = self.spec.head_dim as usize;
        let group = ATOM_ROWS as usize;
        bytes
            .par_chunks_exact(self.spec.image().bytes(ATOM_ROWS) as usize)
            .enumerate()
            .with_min_len(4)
            .map_init(
                || vec![0.0; dim],
                |found, (index, bytes)| {
                    let mut worst = Worst::new();
                    for row in 0..group {
                        decode(self.spec.image(), bytes, row, found);
                        self.compare_row(operand, first + index * group + row, found, &mut worst);
                    }
                    worst
                },
            )
            .reduce(Worst::new, Worst::merge)
    }

    fn compare_row(&self, operand: usize, packed: usize, found: &[f64], worst: &mut Worst) {
        let (spec, index) = (self.spec, self.index);
        let Some(&row) = self.order[operand][..self.live()].get(packed) else {
            let error = if found.iter().all(|&x| x == 0.0) { 0.0 } else { f64::INFINITY };
            return worst.add(error, 0.0, || format!("{} of the packed head, beyond what is valid", index.row(packed)));
        };
        let (tokens, expected) = match operand {
            0 => {
                let mut expected = self.reference.row(Operand::Query, index.item, row, index.head);
                expected.iter_mut().for_each(|x| *x *= self.inputs.query_scale());
                (&self.inputs.q, expected)
            }
            1 => (&self.inputs.k, self.reference.row(Operand::Key, index.item, row, index.head)),
            _ => (&self.inputs.v, self.inputs.v.row(index.item, row, index.head)),
        };
        let rounded: Vec<f64> = expected.iter().map(|&x| ComputeType::from(spec.dtype).round(x)).collect();
        // V is copied, and so is K in a model without norm and RoPE.
        let tolerance = if operand == 2 || (operand == 1 && spec.qk_norm.is_none() && spec.rope.is_none()) {
            0.0
        } else {
            // The elements that the statistic was taken over.
            let heads = if spec.norm_is_over_heads() { 0..tokens.heads } else { index.head..index.head + 1 };
            let input: Vec<f64> = match spec.qk_norm.as_ref().map(|norm| norm.kind) {
                Some(NormKind::Layer) => heads.flat_map(|head| tokens.row(index.item, row, head)).collect(),
                // Other tolerances do not depend on the elements.
                Some(NormKind::Rms) | None => Vec::new(),
            };
            tolerance::packed_row(spec, spec.dtype.into(), &input, &expected)
        };
        worst.add(row_error(found, &rounded), tolerance, || index.row(row));
    }

    /// The whole image of Q (`operand` 0), without its scale, or K (1) as numbers,
    /// `[rows, head_dim]` in the model's order.
    pub fn unpack(&self, operand: usize, image: &[u8]) -> Vec<f64> {
        let (dim, order) = (self.spec.head_dim as usize, self.order[operand]);
        let mut packed_of = vec![0; order.len()];
        for (packed, &row) in order.iter().enumerate() {
            packed_of[row] = packed;
        }
        let group = ATOM_ROWS as usize;
        let mut rows = vec![0.0; order.len() * dim];
        rows.par_chunks_exact_mut(dim).zip(&packed_of).with_min_len(64).for_each(|(values, &packed)| {
            let group_bytes = self.spec.image().bytes(ATOM_ROWS) as usize;
            let bytes = &image[packed / group * group_bytes..][..group_bytes];
            decode(self.spec.image(), bytes, packed % group, values);
            if operand == 0 {
                values.iter_mut().for_each(|x| *x /= self.inputs.query_scale());
            }
        });
        rows
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
