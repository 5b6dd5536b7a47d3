//! Tables of a study, for people.

use std::fmt::Write;

use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::Compute;

use crate::{Layer, Study};

/// The relative error of each layer at each density, and what the allowed error needs.
pub fn by_layer(study: &Study) -> String {
    let mut text = heading(study);
    text += "relative errors of layers, each head with its better mask\n\n";
    text += &format!("{:>5} {:>6} {:>5}", "step", "noise", "layer");
    study.densities.iter().for_each(|density| text += &format!(" {density:>7}"));
    heads_of_8_bits(study, &mut text);
    let (width, in_16_bits) = if study.has_eight_bits() { (12, "  in 16 bits") } else { (7, "") };
    let last = ["needs", "spatial", "temporal", "worst head"];
    text += &format!("  {:>width$}{in_16_bits} {:>8} {:>8}  {}\n", last[0], last[1], last[2], last[3]);
    for_each_layer(study, &mut text, |text, layer| {
        (0..study.densities.len()).for_each(|density| *text += &format!(" {:>7}", shown(layer.error(density))));
        in_8_bits(study, text, |density| layer.error_in_8_bits(density));
        let found = study.needs(layer);
        let mut needs = if found.density < 1.0 { found.density.to_string() } else { "dense".into() };
        if found.compute != Compute::Dtype {
            needs += " ";
            needs += found.compute.as_str();
        }
        *text += &format!("  {needs:>width$}");
        let size = layer.size.len();
        if study.has_eight_bits() {
            let count = (0..size).filter(|&head| found.bits(head) == 16).count();
            *text += &format!(" {:>11}", format!("{count} of {size}"));
        }
        // Where nothing suffices, heads are those of the largest density.
        let known = study.densities.iter().position(|&density| density == found.density);
        let density = known.unwrap_or(study.densities.len() - 1);
        let heads: Vec<_> = (0..size).map(|head| layer.head(density, head)).collect();
        let [spatial, temporal] =
            HeadType::CANDIDATES.map(|mask| heads.iter().flatten().filter(|head| head.0 == mask).count());
        let error = |head: usize| heads[head].map_or(f64::INFINITY, |(_, error)| error);
        let worst = (0..heads.len()).max_by(|&a, &b| error(a).total_cmp(&error(b))).unwrap_or(0);
        *text += &format!(" {spatial:>8} {temporal:>8}  {worst} ({})\n", shown(error(worst)));
    });
    text += "\nspatial, temporal and the worst head are those of masks at the density that is needed, or at the largest where that is dense\n";
    text
}

/// The relative errors of both masks of each head at each density, and where 8 bits were tried, how
/// many the head needs.
pub fn by_head(study: &Study) -> String {
    let mut text = heading(study);
    text += "relative errors of heads under each mask\n\n";
    text += &format!("{:>5} {:>6} {:>5} {:>5} {:>9}", "step", "noise", "layer", "head", "better");
    for mask in HeadType::CANDIDATES {
        text += &format!(" | {:<8}", mask.name());
        study.densities.iter().for_each(|density| text += &format!(" {density:>7}"));
    }
    heads_of_8_bits(study, &mut text);
    text += if study.has_eight_bits() { " | needs\n" } else { "\n" };
    for_each_layer(study, &mut text, |text, layer| {
        let needs = study.needs(layer);
        let place = text.split_off(text.rfind('\n').map_or(0, |end| end + 1));
        for head in 0..layer.size.len() {
            let known = (0..study.densities.len()).filter_map(|density| layer.head(density, head));
            let mut masks: Vec<&str> = known.map(|(mask, _)| mask.name()).collect();
            masks.dedup();
            let better = match masks[..] {
                [] => "-",
                [mask] => mask,
                _ => "varies",
            };
            *text += &format!("{place} {head:>5} {better:>9}");
            for mask in 0..HeadType::CANDIDATES.len() {
                *text += &format!(" | {:<8}", "");
                for density in 0..study.densities.len() {
                    *text += &format!(" {:>7}", shown(layer.head_error(density, head, mask)));
                }
            }
            in_8_bits(study, text, |density| layer.head_error_in_8_bits(density, head));
            if study.has_eight_bits() {
                *text += &format!(" | {:>2} bits", needs.bits(head));
            }
            *text += "\n";
        }
    });
    text
}

/// The heads of the columns of 8 bits, where these were tried: each density, and dense attention.
fn heads_of_8_bits(study: &Study, text: &mut String) {
    if study.has_eight_bits() {
        *text += " | 8 bits:";
        study.densities.iter().for_each(|density| *text += &format!(" {density:>7}"));
        *text += &format!(" {:>7}", "dense");
    }
}

/// The columns below them.
fn in_8_bits(study: &Study, text: &mut String, error: impl Fn(usize) -> f64) {
    if study.has_eight_bits() {
        *text += &format!(" | {:7}", "");
        (0..=study.densities.len()).for_each(|density| *text += &format!(" {:>7}", shown(error(density))));
    }
}

/// Writes step, noise and number of each layer that was called, and what `row` adds.
fn for_each_layer(study: &Study, text: &mut String, row: impl Fn(&mut String, &Layer)) {
    for step in &study.steps {
        let noise = step.noise.map_or("-".into(), |noise| format!("{noise:.3}"));
        for (number, layer) in step.layers.iter().enumerate() {
            let Some(layer) = layer else { continue };
            // Writing to a String cannot fail.
            let _ = write!(text, "{:>5} {noise:>6} {number:>5}", step.index);
            row(text, layer);
        }
    }
}

fn heading(study: &Study) -> String {
    let models: Vec<String> =
        study.models.iter().map(|model| format!("{}, {} layers", model.name, model.layers)).collect();
    let [frames, height, width] = study.video;
    format!(
        "{}; video of {frames} x {height} x {width} patches; {} sampled rows of each head; allowed error {}\n",
        models.join("; "),
        study.sampled_rows,
        study.error
    )
}

/// A relative error in few characters. "-" is one that is not known.
fn shown(error: f64) -> String {
    match error {
        error if error.is_infinite() => "-".into(),
        error if error < 0.0005 => format!("{error:.0e}"),
        error => format!("{error:.4}"),
    }
}
