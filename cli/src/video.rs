//! Q, K and V from the pixels of a video, for trying a spec on real content without its model.
//!
//! Every frame is cut into the spec's grid of patches. Each patch is averaged to 4 x 4 RGB cells,
//! which make 48 numbers. These are centred and scaled over the video. Fixed random matrices, one
//! for each head, turn them into
//!
//! * V: the patch's content,
//! * Q and K: the same content, and a constant vector on the RoPE pairs of one axis.
//!
//! Content makes patches that look alike attract each other. RoPE turns the constant vector by the
//! token's position. So its product of Q and K depends on the distance along the axis, and is
//! largest at distance zero.
//!
//! Heads with an even number hold the vector on the frame axis. They look at their own and
//! neighbouring frames: spatial heads. Heads with an odd number hold it on height and width. They
//! look at their own patch in all frames: temporal heads. Content makes up a growing part of Q and
//! K from head to head, so no two heads are alike.
//!
//! Trained heads come to be of the two kinds in the same way. It says nothing about a model's
//! quality. For a spec without RoPE the rotation is done here, since a model without RoPE carries
//! positions in its tokens. Text rows are random.

use framestride::shapes::spec::{Pairs, Rope, Spec};
use framestride::{Error, Result};
use framestride_check::random::{normal, row_generator};
use framestride_check::rope::{RopeTables, paired, rope_axis};
use framestride_check::tensors::{Inputs, Tokens};
use rayon::prelude::*;

use crate::tensor_files::Frames;

/// How many cells a patch has along each side.
const CELLS: usize = 4;

/// How many numbers describe a patch: red, green and blue of each cell.
pub const FEATURES: usize = CELLS * CELLS * 3;

/// The seed of the matrices and of the text.
const SEED: u64 = 0x6672616d65;

/// The grid of a spec. It is checked against a video, which `source` names in errors.
pub fn grid(spec: &Spec, frames: &Frames, source: &str) -> Result<[usize; 2]> {
    let Some(grid) = spec.grid else {
        return Err(Error::input(
            format!("spec {}", spec.name),
            "no video.grid",
            "a grid of height x width patches",
            "Add grid = [height, width] to [video], so that frames can be cut into patches",
        ));
    };
    let grid = grid.map(|side| side as usize);
    if frames.count < spec.layout.frames.value as usize || frames.height < grid[0] || frames.width < grid[1] {
        return Err(Error::input(
            format!("{source}, tensor frames"),
            format!("{} frames of {} x {} pixels", frames.count, frames.height, frames.width),
            format!(
                "at least {} frames of {} x {} pixels, one for each patch of spec {}",
                spec.layout.frames.value, grid[0], grid[1], spec.name
            ),
            "Give a longer or larger video, or a smaller spec",
        ));
    }
    Ok(grid)
}

/// The features of the patches of the first `count` frames, `[frames, patches, FEATURES]`. Each
/// feature has mean 0 and deviation 1.
pub fn features(frames: &Frames, count: usize, [grid_height, grid_width]: [usize; 2]) -> Vec<f64> {
    let patches = grid_height * grid_width;
    let mut features: Vec<f64> = (0..count * patches)
        .into_par_iter()
        .flat_map_iter(|token| {
            let (frame, patch) = (token / patches, token % patches);
            let corner = (patch / grid_width, patch % grid_width);
            (0..FEATURES).map(move |feature| {
                let (cell, channel) = (feature / 3, feature % 3);
                // A cell has at least one pixel, since patches need not be a multiple of four
                // pixels.
                let span = |patch: usize, cell: usize, grid: usize, pixels: usize| {
                    let edge = |cell: usize| (patch * CELLS + cell) * pixels / (grid * CELLS);
                    edge(cell)..edge(cell + 1).max(edge(cell) + 1).min(pixels)
                };
                let rows = span(corner.0, cell / CELLS, grid_height, frames.height);
                let columns = span(corner.1, cell % CELLS, grid_width, frames.width);
                let pixels = rows.len() * columns.len();
                let mut sum = 0.0;
                for row in rows {
                    for column in columns.clone() {
                        let pixel = (frame * frames.height + row) * frames.width + column;
                        sum += f64::from(frames.pixels[pixel * 3 + channel]);
                    }
                }
                sum / pixels as f64
            })
        })
        .collect();
    let tokens = (count * patches) as f64;
    for feature in 0..FEATURES {
        let values = || features.iter().skip(feature).step_by(FEATURES);
        let mean = values().sum::<f64>() / tokens;
        let deviation = (values().map(|x| (x - mean) * (x - mean)).sum::<f64>() / tokens).sqrt().max(1e-6);
        features.iter_mut().skip(feature).step_by(FEATURES).for_each(|x| *x = (*x - mean) / deviation);
    }
    features
}

/// The constant vector of a head, of norm 1.
///
/// Pair `i` of an axis that the head looks along holds sqrt(0.5^i) in its first channel. So the
/// fastest turning pairs count most, which tell near positions apart. Height counts three times as
/// much as width. In the temporal layout, patches follow each other along the width, so a step in
/// height is as far as many in width. Signs alternate, so that a layer norm's mean takes nothing
/// away.
fn position_vector(rope: Rope, head: usize, head_dim: usize) -> Vec<f64> {
    let half = rope.channels as usize / 2;
    let mut vector = vec![0.0; head_dim];
    for pair in 0..half {
        let (axis, index, _) = rope_axis(pair, half);
        if (axis == 0) == head.is_multiple_of(2) {
            let sign = if index % 2 == 0 { 1.0 } else { -1.0 };
            let share = if axis == 1 { 3.0 } else { 1.0 };
            vector[paired(rope.pairs, pair, half).0] = sign * (share * 0.5f64.powi(index as i32)).sqrt();
        }
    }
    scale_to(&mut vector, 1.0);
    vector
}

fn scale_to(vector: &mut [f64], size: f64) {
    let norm = framestride_check::reference::norm(vector).max(1e-12);
    vector.iter_mut().for_each(|x| *x *= size / norm);
}

/// The inputs of a layer with `heads` heads and one batch item, made of the first frames of a
/// video. `source` names it in errors.
pub fn inputs(spec: &Spec, heads: usize, frames: &Frames, source: &str) -> Result<Inputs> {
    let grid = grid(spec, frames, source)?;
    let layout = &spec.layout;
    let (count, head_dim) = (layout.frames.value as usize, spec.head_dim as usize);
    let features = features(frames, count, grid);
    let video = count * grid[0] * grid[1];
    let first_video = layout.before as usize;
    let default =
        Rope { pairs: Pairs::Interleaved, channels: spec.head_dim, before: false, after: false, per_head: false };
    let rope = spec.rope.unwrap_or(default);
    let turned = Spec { rope: Some(rope), ..spec.clone() };
    let tables = RopeTables::from_grid(&turned, heads);
    // A matrix is head_dim x FEATURES. Q and K have the same.
    let matrix = |which: u64, head: usize| -> Vec<f64> {
        let mut generator = row_generator(SEED + which, head as u64);
        (0..head_dim * FEATURES).map(|_| normal(&mut generator) / (FEATURES as f64).sqrt()).collect()
    };
    let tokens = |which: u64| {
        let matrices: Vec<Vec<f64>> = (0..heads).map(|head| matrix(which / 2, head)).collect();
        let positions: Vec<Vec<f64>> = (0..heads).map(|head| position_vector(rope, head, head_dim)).collect();
        let mut tokens = Tokens::zeros(spec.dtype, [1, layout.sequence() as usize, heads, head_dim]);
        tokens.fill(|_, row, head, values| {
            let Some(token) = row.checked_sub(first_video).filter(|&token| token < video) else {
                let mut generator = row_generator(SEED + 10 + which, (row * heads + head) as u64);
                return values.fill_with(|| normal(&mut generator));
            };
            let content = &features[token * FEATURES..][..FEATURES];
            for (value, weights) in values.iter_mut().zip(matrices[head].chunks_exact(FEATURES)) {
                *value = weights.iter().zip(content).map(|(weight, feature)| weight * feature).sum();
            }
            if which == 2 {
                return;
            }
            // 10 to 40 per cent of the squared norm, which is head_dim, are content.
            let share = 0.1 * (1 + head / 2 % 4) as f64;
            scale_to(values, (share * head_dim as f64).sqrt());
            for (value, position) in values.iter_mut().zip(&positions[head]) {
                *value += position * ((1.0 - share) * head_dim as f64).sqrt();
            }
            if spec.rope.is_none() {
                tables.rotate(&turned, heads, row, head, values, 1.0);
            }
        });
        tokens
    };
    Ok(Inputs::new([tokens(0), tokens(1), tokens(2)], spec.rope.map(|_| tables)))
}

/// The video token whose attention is worth a look: the patch of the middle frame with the
/// strongest contrast.
pub fn interesting_token(features: &[f64], frames: usize) -> usize {
    let patches = features.len() / FEATURES / frames;
    let contrast = |token: &usize| -> f64 {
        let cells = &features[token * FEATURES..][..FEATURES];
        let mean = cells.iter().sum::<f64>() / FEATURES as f64;
        cells.iter().map(|x| (x - mean) * (x - mean)).sum()
    };
    let first = frames / 2 * patches;
    (first..first + patches).max_by(|a, b| contrast(a).total_cmp(&contrast(b))).unwrap_or(first)
}
