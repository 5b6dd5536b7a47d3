//! Tables of rotary embeddings: what the kernels are given, and the rotation that undoes it.

use framestride::shapes::spec::{Pairs, Spec};
use rand::RngExt;
use rayon::prelude::*;

use crate::random::{Drawn, quick_generator};

/// RoPE tables of each batch item, or one for all. Each has the shape [`Spec::rope_table_shape`],
/// and they follow each other.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTables {
    /// How many tables there are: one for each batch item, or 1 when all items share it.
    pub items: usize,
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// The axis of a pair of channels in the default RoPE, of `pairs` pairs. Gives the axis (0 frame, 1
/// height, 2 width), the pair's index on that axis, and how many pairs the axis has.
///
/// A quarter of the pairs turns with the frame. Of the rest, half turns with the height and half
/// with the width.
pub fn rope_axis(pair: usize, pairs: usize) -> (usize, usize, usize) {
    let frame = pairs / 4;
    let height = (pairs - frame) / 2;
    if pair < frame {
        (0, pair, frame)
    } else if pair < frame + height {
        (1, pair - frame, height)
    } else {
        (2, pair - frame - height, pairs - frame - height)
    }
}

/// Frame, height and width of the token at `row` of the model's order. On every axis text tokens lie
/// behind all video tokens: first those before the video, then those after it.
pub fn token_coordinates(spec: &Spec, row: usize) -> [usize; 3] {
    let layout = &spec.layout;
    let patches = layout.tokens_per_frame.value as usize;
    let [height, width] = spec.grid.map_or([1, patches], |grid| grid.map(|side| side as usize));
    let (before, tokens) = (layout.before as usize, layout.frames.value as usize * patches);
    if row < before || row >= before + tokens {
        let text = if row < before { row } else { row - tokens };
        return [(layout.frames.value as usize).max(height).max(width) + text; 3];
    }
    let video = row - before;
    [video / patches, video % patches / width, video % width]
}

impl RopeTables {
    /// Number of elements of one table for `heads` heads.
    pub(crate) fn length(spec: &Spec, heads: usize) -> usize {
        spec.rope_table_elements(heads as u32) as usize
    }

    /// The tables that are taken when none are given. All batch items share them.
    ///
    /// Channels turn along three axes ([`rope_axis`]). Pair `i` of the `n` on its axis turns by
    /// `10000^(-i / n)` a step. With tables per head, the frequencies of head `h` of `H` lie a
    /// fraction `h / H` of a step further on. So all heads together hold one sequence of
    /// frequencies.
    pub fn from_grid(spec: &Spec, heads: usize) -> RopeTables {
        let half = pairs(spec);
        let tables = if spec.rope.is_some_and(|rope| rope.per_head) { heads } else { 1 };
        let first_row = spec.rope_rows().start as usize;
        let angles: Vec<f64> = (0..RopeTables::length(spec, heads))
            .into_par_iter()
            .map(|index| {
                let (row, table, pair) = (index / half / tables, index / half % tables, index % half);
                let (axis, index, pairs) = rope_axis(pair, half);
                let step = index as f64 + table as f64 / tables as f64;
                token_coordinates(spec, first_row + row)[axis] as f64 * 10000f64.powf(-step / pairs as f64)
            })
            .collect();
        RopeTables {
            items: 1,
            cos: angles.par_iter().map(|angle| angle.cos() as f32).collect(),
            sin: angles.par_iter().map(|angle| angle.sin() as f32).collect(),
        }
    }

    /// `items` tables of independent random angles, uniform over the circle.
    pub fn random(spec: &Spec, items: usize, heads: usize, seed: u64) -> RopeTables {
        let half = pairs(spec);
        let length = items * RopeTables::length(spec, heads);
        let mut tables = RopeTables { items, cos: vec![0.0; length], sin: vec![0.0; length] };
        let rows = tables.cos.par_chunks_exact_mut(half).zip(tables.sin.par_chunks_exact_mut(half));
        rows.enumerate().for_each(|(row, (cos, sin))| {
            let mut generator = quick_generator(seed, Drawn::Angles, row as u64);
            for (cos, sin) in cos.iter_mut().zip(sin) {
                let angle = std::f64::consts::TAU * generator.random::<f64>();
                (*cos, *sin) = (angle.cos() as f32, angle.sin() as f32);
            }
        });
        tables
    }

    /// Turns the row of one token of Q or K as the table of the first item says, for `direction` 1.
    /// With -1 it turns back what a kernel will turn forth. `token` counts in the model's order.
    pub fn rotate(&self, spec: &Spec, heads: usize, token: usize, head: usize, row: &mut [f64], direction: f64) {
        let Some(rope) = &spec.rope else { return };
        let rows = spec.rope_rows();
        if !rows.contains(&(token as u32)) {
            return;
        }
        let table_row = token - rows.start as usize;
        let half = pairs(spec);
        let table = if rope.per_head { table_row * heads + head } else { table_row };
        for pair in 0..half {
            let (a, b) = paired(rope.pairs, pair, half);
            let (cos, sin) = (f64::from(self.cos[table * half + pair]), f64::from(self.sin[table * half + pair]));
            let sin = direction * sin;
            (row[a], row[b]) = (row[a] * cos - row[b] * sin, row[b] * cos + row[a] * sin);
        }
    }
}

/// Pairs of channels that a spec rotates.
fn pairs(spec: &Spec) -> usize {
    spec.rope.map_or(0, |rope| rope.channels as usize / 2)
}

/// The two channels of a pair, of `half` pairs.
pub fn paired(pairs: Pairs, pair: usize, half: usize) -> (usize, usize) {
    match pairs {
        Pairs::Interleaved => (2 * pair, 2 * pair + 1),
        Pairs::Half => (pair, pair + half),
    }
}
