//! `framestride describe`: what follows from a spec, without running anything.

use clap::Args;
use clap::builder::PossibleValuesParser;
use framestride::shapes::arch::Arch;
use framestride::shapes::estimate::Rates;
use framestride::{Description, Result};
use serde_json::{Value, json};

use crate::outcome::Outcome;
use crate::spec_argument::read_spec;

/// Computes sequence, tiles, half widths, exact densities, workspace and arithmetic of a spec.
/// Estimates what it gains over dense attention on a GPU.
#[derive(Args)]
pub struct Describe {
    /// The spec.
    spec: String,
    /// The GPU to estimate for. Without it, that is the first one of this machine, or all there are
    /// rates of.
    #[arg(long, value_parser = PossibleValuesParser::new(Rates::ALL.map(|rates| rates.gpu)))]
    gpu: Option<String>,
}

/// Computes what follows from a spec.
pub fn describe(Describe { spec, gpu }: Describe) -> Result<Outcome> {
    let spec = read_spec(&spec)?;
    let found = Description::new(&spec, gpu.as_deref())?;
    let (layout, tiles) = (&spec.layout, spec.tiles(Arch::default()));
    let masks = found.masks.each_ref().map(|mask| {
        json!({
            "mask": mask.head_type.name(),
            "half_width": mask.half_width,
            "visible_pairs": mask.visible_pairs.to_string(),
            "density": mask.density,
            "flop": mask.flop,
            "tiles_skipped": mask.tiles_skipped,
            "tiles_full": mask.tiles_full,
            "tiles_edge": mask.tiles_edge,
        })
    });
    let expected = found.times.iter().map(|(rates, times)| {
        json!({
            "gpu": rates.gpu,
            "gain": times.speedup(),
            "can_gain": times.obstacle().is_none(),
            "layer_ms": times.layer(),
            "dense_layer_ms": times.dense_layer(),
        })
    });
    let json = json!({
        "name": spec.name,
        "sequence": layout.sequence(),
        "frames": layout.frames.value,
        "tokens_per_frame": layout.tokens_per_frame.value,
        "text_tokens": layout.text_tokens(),
        "before_tokens": layout.before,
        "after_tokens": layout.after,
        "sink_frames": layout.sink_frames,
        "heads": spec.heads,
        "head_dim": spec.head_dim,
        "dtype": spec.dtype.as_str(),
        "batch": spec.batch,
        "query_tile_rows": tiles.query_rows,
        "key_tile_rows": tiles.key_rows,
        "workspace_bytes": found.workspace_bytes,
        "masks": masks,
        "expected": expected.collect::<Vec<Value>>(),
    });
    Ok(Outcome::new(found.to_string(), json, true))
}
