//! The picture of a study: density against error, and heads by layer.

use framestride::shapes::layout::HeadType;
use framestride_pictures::Picture;
use image::Rgb;

use crate::{Layer, Study};

const MARGIN: u32 = 24;
const LINE: u32 = 18;
/// The width of a character.
const LETTER: u32 = 7;

/// The plot of the chart, without its labels.
const CHART: [u32; 2] = [640, 320];
/// Room for labels on its left and below it.
const LABELS: [u32; 2] = [56, 40];

/// A panel of heads has about this size, with cells of so many pixels.
const PANEL: u32 = 420;
const CELL: [u32; 2] = [6, 18];

const AXIS: Rgb<u8> = Rgb([150, 154, 160]);
const GRID: Rgb<u8> = Rgb([226, 228, 230]);
const ALLOWED: Rgb<u8> = Rgb([204, 41, 54]);
const UNKNOWN: Rgb<u8> = Rgb([210, 210, 210]);

/// Smaller errors are drawn as this one. Rounding to 16 bits is larger than it.
const LEAST: f64 = 1e-4;
/// Larger errors are drawn as this one.
const MOST: f64 = 10.0;

/// From the first layer to the last one.
const LAYERS: [Rgb<u8>; 3] = [Rgb([68, 1, 84]), Rgb([33, 145, 140]), Rgb([230, 190, 30])];
/// From a small error to a large one.
const SPATIAL: [Rgb<u8>; 3] = [Rgb([206, 239, 234]), Rgb([42, 157, 143]), Rgb([8, 47, 46])];
const TEMPORAL: [Rgb<u8>; 3] = [Rgb([253, 236, 200]), Rgb([232, 141, 48]), Rgb([84, 32, 6])];
/// Of heads in 8 bits.
const EIGHT_BITS: [Rgb<u8>; 3] = [Rgb([224, 232, 250]), Rgb([76, 110, 200]), Rgb([16, 24, 84])];
/// Of heads that stay in 16 bits, from no step to all of them.
const SIXTEEN_BITS: [Rgb<u8>; 3] = [Rgb([224, 232, 250]), Rgb([190, 140, 190]), Rgb([120, 20, 90])];
/// The errors at both ends of these colours.
const ENDS: [f64; 2] = [0.01, 1.0];

/// Draws the relative error of each layer against the density, and below it the heads of all layers
/// at each density: which mask is better, and how large its error is. Where 8 bits were tried, thin
/// lines have their errors, and two more panels show those of dense heads, and in how many steps a
/// head stays in 16 bits. Of several steps it shows root mean squares.
pub fn picture(study: &Study) -> Picture {
    let layers = study.steps[0].layers.len();
    let heads = study.steps.iter().flat_map(|step| step.layers.iter().flatten()).map(|layer| layer.size.len());
    let heads = heads.max().unwrap_or(1);
    let cell = (PANEL / layers.max(heads) as u32).clamp(CELL[0], CELL[1]);
    let panel = [(layers as u32 * cell).max(26 * LETTER) + LABELS[0], heads as u32 * cell + 3 * LINE];
    let chart_width = LABELS[0] + CHART[0] + 30 * LETTER;
    let panels = study.densities.len() as u32 + 2 * u32::from(study.has_eight_bits());
    let columns = (chart_width.max(1100) / (panel[0] + MARGIN)).clamp(1, panels);
    let rows = panels.div_ceil(columns);
    let panels_top = MARGIN + 3 * LINE + CHART[1] + LABELS[1] + MARGIN;
    let mut picture = Picture::new(
        2 * MARGIN + chart_width.max(columns * (panel[0] + MARGIN)),
        panels_top + 3 * LINE + rows * (panel[1] + MARGIN),
    );
    let names: Vec<&str> = study.models.iter().map(|model| model.name.as_str()).collect();
    let steps: Vec<String> = study.steps.iter().map(|step| step.index.to_string()).collect();
    picture.text(MARGIN, MARGIN, &format!("{}: steps {}", names.join(", "), steps.join(", ")));
    let thin = if study.has_eight_bits() { "; thin lines: in 8 bits" } else { "" };
    let title = format!("relative error of each layer against density, each head with its better mask{thin}");
    picture.text(MARGIN, MARGIN + LINE, &title);
    draw_chart(&mut picture, study, [MARGIN + LABELS[0], MARGIN + 3 * LINE]);
    picture.text(MARGIN, panels_top, "heads by layer: the better mask, and its relative error");
    draw_legend(&mut picture, study, [MARGIN, panels_top + LINE]);
    for number in 0..panels {
        let left = MARGIN + LABELS[0] + number % columns * (panel[0] + MARGIN);
        let top = panels_top + 3 * LINE + number / columns * (panel[1] + MARGIN);
        let number = number as usize;
        let title = match study.densities.get(number) {
            Some(density) => format!("density {density}"),
            None if number == study.densities.len() => "in 8 bits, dense".into(),
            None => "stay in 16 bits".into(),
        };
        picture.text(left, top, &title);
        draw_heads(&mut picture, study, number, [left, top + LINE], heads, cell);
    }
    picture
}

/// The root mean square of some number of a layer over the steps that called it.
fn over_steps(study: &Study, layer: usize, error: impl Fn(&Layer) -> f64) -> Option<f64> {
    let squares: Vec<f64> = study
        .steps
        .iter()
        .filter_map(|step| step.layers[layer].as_ref().map(&error))
        .filter(|error| error.is_finite())
        .map(|error| error * error)
        .collect();
    (!squares.is_empty()).then(|| (squares.iter().sum::<f64>() / squares.len() as f64).sqrt())
}

fn draw_chart(picture: &mut Picture, study: &Study, [left, top]: [u32; 2]) {
    let layers = study.steps[0].layers.len();
    let lines = |error: fn(&Layer, usize) -> f64| -> Vec<Vec<Option<f64>>> {
        let point = |layer, density| over_steps(study, layer, |layer| error(layer, density));
        (0..layers).map(|layer| (0..study.densities.len()).map(|density| point(layer, density)).collect()).collect()
    };
    let (in_16, in_8) = (lines(Layer::error), lines(Layer::error_in_8_bits));
    // Powers of ten enclose all errors.
    let all = || in_16.iter().chain(&in_8).flatten().flatten().copied();
    let least = all().fold(study.error, f64::min).max(LEAST);
    let most = all().fold(study.error, f64::max).min(MOST);
    let (low, high) = (least.log10().floor(), most.log10().ceil().max(least.log10().floor() + 1.0));
    let widest = study.densities.last().copied().unwrap_or(1.0) * 1.05;
    let [width, height] = CHART;
    let x = |density: f64| left as i32 + (density / widest * f64::from(width)) as i32;
    let y = |error: f64| {
        let part = (high - error.max(LEAST).log10()) / (high - low);
        top as i32 + (part.clamp(0.0, 1.0) * f64::from(height)) as i32
    };
    let (right, bottom) = ((left + width) as i32, (top + height) as i32);
    for power in low as i32..=high as i32 {
        let error = 10f64.powi(power);
        picture.line([left as i32, y(error)], [right, y(error)], GRID);
        let label = format!("{error}");
        picture.text(left - 8 - LETTER * label.len() as u32, (y(error) - 7).max(0) as u32, &label);
    }
    let mut free = 0;
    for &density in &study.densities {
        picture.line([x(density), top as i32], [x(density), bottom], GRID);
        let label = format!("{density}");
        let begin = x(density) as u32 - LETTER * label.len() as u32 / 2;
        // Labels of densities that lie close would cover each other.
        if begin >= free {
            picture.text(begin, bottom as u32 + 6, &label);
            free = begin + LETTER * (label.len() as u32 + 1);
        }
    }
    picture.text(left + width / 2 - 4 * LETTER, bottom as u32 + 6 + LINE, "density");
    picture.line([left as i32, top as i32], [left as i32, bottom], AXIS);
    picture.line([left as i32, bottom], [right, bottom], AXIS);
    picture.line([left as i32, y(study.error)], [right, y(study.error)], ALLOWED);
    picture.text(left + 6, (y(study.error) - 16).max(0) as u32, &format!("allowed: {}", study.error));
    for (number, line) in in_8.iter().chain(&in_16).enumerate() {
        let colour = between(LAYERS, (number % layers) as f64 / (layers.max(2) - 1) as f64);
        let points: Vec<[i32; 2]> =
            study.densities.iter().zip(line).filter_map(|(&at, error)| Some([x(at), y((*error)?)])).collect();
        let thick = i32::from(number >= layers);
        for pair in points.windows(2) {
            picture.line(pair[0], pair[1], colour);
            picture.line([pair[0][0], pair[0][1] + thick], [pair[1][0], pair[1][1] + thick], colour);
        }
        for [x, y] in points {
            let (half, side) = if thick == 1 { (2, 5) } else { (1, 3) };
            picture.rectangle(x as u32 - half, y as u32 - half, side, side, colour);
        }
    }
    let (key, side) = (right as u32 + 8, top);
    picture.text(key, side, "layer");
    let shown: Vec<usize> = if layers <= 8 { (0..layers).collect() } else { vec![0, layers / 2, layers - 1] };
    for (row, layer) in (1..).zip(shown) {
        let colour = between(LAYERS, layer as f64 / (layers.max(2) - 1) as f64);
        picture.rectangle(key, side + row * LINE + 2, 10, 10, colour);
        picture.text(key + 16, side + row * LINE, &layer.to_string());
    }
}

/// Draws the heads at a density. Behind the last one follow those of dense attention in 8 bits, and
/// which stay in 16.
fn draw_heads(picture: &mut Picture, study: &Study, panel: usize, [left, top]: [u32; 2], heads: usize, cell: u32) {
    let layers = study.steps[0].layers.len();
    for layer in 0..layers {
        for head in 0..heads {
            let (x, y) = (left + layer as u32 * cell, top + head as u32 * cell);
            let mut fill = |colour| picture.rectangle(x, y, cell - 1, cell - 1, colour);
            if panel > study.densities.len() {
                fill(steps_in_16_bits(study, layer, head).map_or(UNKNOWN, |part| between(SIXTEEN_BITS, part)));
                continue;
            }
            let best = error_of_head(study, panel, layer, head);
            fill(best.map_or(UNKNOWN, |(error, ramp)| colour(ramp, error)));
            if best.is_some_and(|(error, _)| error > study.error) {
                let dot = cell / 4 + 1;
                let middle = (cell - 1 - dot) / 2;
                picture.rectangle(x + middle, y + middle, dot, dot, ALLOWED);
            }
        }
    }
    picture.text(left - 8 - LETTER, top, "0");
    if heads > 1 {
        let last = (heads - 1).to_string();
        let y = top + (heads as u32 - 1) * cell;
        picture.text(left - 8 - LETTER * last.len() as u32, y.max(top + LINE), &last);
    }
    let below = top + heads as u32 * cell + 6;
    picture.text(left, below, &format!("layer 0 to {}", layers - 1));
    picture.text(left - LABELS[0], top, "head");
}

/// The least error of a head at a density, or dense in 8 bits behind the last one, and its colours.
fn error_of_head(study: &Study, density: usize, layer: usize, head: usize) -> Option<(f64, [Rgb<u8>; 3])> {
    let of_steps = |error: &dyn Fn(&Layer) -> f64| {
        let known = |layer: &Layer| if head < layer.size.len() { error(layer) } else { f64::INFINITY };
        over_steps(study, layer, known)
    };
    if density == study.densities.len() {
        return of_steps(&|layer| layer.head_error_in_8_bits(density, head)).map(|error| (error, EIGHT_BITS));
    }
    let masks = (0..).zip(HeadType::CANDIDATES);
    let errors = masks.filter_map(|(mask, head_type)| {
        Some((of_steps(&|layer| layer.head_error(density, head, mask))?, ramp(head_type)))
    });
    errors.min_by(|a, b| a.0.total_cmp(&b.0))
}

/// The part of the steps that called a layer in which a head of it needs 16 bits.
fn steps_in_16_bits(study: &Study, layer: usize, head: usize) -> Option<f64> {
    let called = study.steps.iter().filter_map(|step| step.layers[layer].as_ref());
    let bits: Vec<u32> =
        called.filter(|layer| head < layer.size.len()).map(|layer| study.needs(layer).bits(head)).collect();
    let in_16 = bits.iter().filter(|&&bits| bits == 16).count();
    (!bits.is_empty()).then(|| in_16 as f64 / bits.len() as f64)
}

/// The scales of colours with what is at their ends, and what a dot means.
fn draw_legend(picture: &mut Picture, study: &Study, [left, top]: [u32; 2]) {
    let masks = HeadType::CANDIDATES.map(|mask| (mask.name(), ramp(mask)));
    let in_8_bits = study.has_eight_bits().then_some(("8 bits", EIGHT_BITS));
    let errors = ENDS.map(|end| end.to_string());
    let mut x = left;
    for (name, ramp) in masks.into_iter().chain(in_8_bits) {
        x = draw_scale(picture, [x, top], &format!("{name} {}", errors[0]), ramp, &errors[1]);
    }
    picture.rectangle(x, top + 4, 5, 5, ALLOWED);
    picture.text(x + 2 * LETTER, top, &format!("above {}", study.error));
    x += LETTER * 16;
    picture.rectangle(x, top + 1, 10, 11, UNKNOWN);
    picture.text(x + 2 * LETTER, top, "not known");
    if in_8_bits.is_some() {
        draw_scale(picture, [left, top + LINE], "16 bits in no step", SIXTEEN_BITS, "in all");
    }
}

/// A scale of colours between two texts. It returns where the next one begins.
fn draw_scale(picture: &mut Picture, [left, top]: [u32; 2], first: &str, ramp: [Rgb<u8>; 3], last: &str) -> u32 {
    const WIDTH: u32 = 100;
    picture.text(left, top, first);
    let x = left + LETTER * (first.len() as u32 + 1);
    for at in 0..WIDTH {
        picture.rectangle(x + at, top + 1, 1, 11, between(ramp, f64::from(at) / f64::from(WIDTH - 1)));
    }
    picture.text(x + WIDTH + LETTER, top, last);
    x + WIDTH + LETTER * (last.len() as u32 + 4)
}

fn ramp(mask: HeadType) -> [Rgb<u8>; 3] {
    if mask == HeadType::Spatial { SPATIAL } else { TEMPORAL }
}

/// The colour of an error, on a logarithmic scale.
fn colour(ramp: [Rgb<u8>; 3], error: f64) -> Rgb<u8> {
    let part = (error.max(ENDS[0]) / ENDS[0]).ln() / (ENDS[1] / ENDS[0]).ln();
    between(ramp, part.min(1.0))
}

/// A colour at a part of the way, 0 to 1.
fn between(stops: [Rgb<u8>; 3], part: f64) -> Rgb<u8> {
    let (from, to, part) =
        if part < 0.5 { (stops[0], stops[1], 2.0 * part) } else { (stops[1], stops[2], 2.0 * part - 1.0) };
    Rgb([0, 1, 2].map(|channel| {
        let (from, to) = (f64::from(from.0[channel]), f64::from(to.0[channel]));
        (from + (to - from) * part).round() as u8
    }))
}
