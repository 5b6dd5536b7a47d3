//! `framestride describe`: what follows from a spec, without running anything.

use clap::Args;
use clap::builder::PossibleValuesParser;
use framestride::device::Gpu;
use framestride::shapes::estimate::{LayerTimes, MULTIPROCESSORS, Obstacle, Rates};
use framestride::shapes::layout::{HeadType, Layout};
use framestride::shapes::spec::Spec;
use framestride::{Result, workspace_layout};
use serde::Serialize;
use serde_json::json;

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

/// What is estimated for one GPU.
#[derive(Serialize)]
struct Expectation {
    gpu: &'static str,
    gain: f64,
    can_gain: bool,
    layer_ms: f64,
    dense_layer_ms: f64,
}

#[derive(Serialize)]
struct HeadDescription {
    mask: &'static str,
    half_width: u32,
    visible_pairs: String,
    density: f64,
    /// Operations of the whole layer, if all heads had this type.
    flop: f64,
    tiles_skipped: u64,
    tiles_full: u64,
    tiles_edge: u64,
}

/// Computes what follows from a spec.
pub fn describe(Describe { spec, gpu }: Describe) -> Result<Outcome> {
    let spec = read_spec(&spec)?;
    let layout = &spec.layout;
    let heads = HeadType::ALL.map(|head| {
        let tiles = spec.tile_counts(head);
        HeadDescription {
            mask: head.name(),
            half_width: layout.half_width(head),
            visible_pairs: spec.visible_pairs(head).to_string(),
            density: spec.density(head),
            flop: spec.flops(head) as f64 * f64::from(spec.heads) * f64::from(spec.batch),
            tiles_skipped: tiles.skipped,
            tiles_full: tiles.full,
            tiles_edge: tiles.edge,
        }
    });
    let tiles = spec.tiles();
    let workspace = workspace_layout(&spec, spec.batch, spec.heads, MULTIPROCESSORS).bytes;
    let mut out = format!(
        "{}\n  sequence   {} = {} frames x {} tokens{}; {} sink frames\n  heads      {} x {} {}, batch {}\n  tiles      {} query rows x {} key rows, {} stages\n  workspace  {:.1} MiB (on an H100 or H200)\n\n  {:<9} {:>10} {:>10} {:>12} {:>10} {:>10} {:>10}\n",
        spec.name,
        layout.sequence(),
        layout.frames.value,
        layout.tokens_per_frame.value,
        text_of(layout),
        layout.sink_frames,
        spec.heads,
        spec.head_dim,
        spec.dtype.as_str(),
        spec.batch,
        tiles.query_rows,
        tiles.key_rows,
        tiles.stages,
        workspace as f64 / f64::from(1 << 20),
        "mask",
        "half width",
        "density",
        "TFLOP",
        "skipped",
        "full",
        "edge tiles",
    );
    for head in &heads {
        out += &format!(
            "  {:<9} {:>10} {:>10.6} {:>12.4} {:>10} {:>10} {:>10}\n",
            head.mask,
            head.half_width,
            head.density,
            head.flop / 1e12,
            head.tiles_skipped,
            head.tiles_full,
            head.tiles_edge
        );
    }
    let (rates, unknown) = rates(gpu.as_deref());
    if let Some(name) = unknown {
        out += &format!("\n  there are no rates of the {name} of this machine\n");
    }
    let mut expected = Vec::new();
    for rates in rates {
        let times = LayerTimes::estimate(&spec, &rates);
        out += &gain_text(&spec, &rates, &times);
        expected.push(Expectation {
            gpu: rates.gpu,
            gain: times.speedup(),
            can_gain: times.obstacle().is_none(),
            layer_ms: times.layer(),
            dense_layer_ms: times.dense_layer(),
        });
    }
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
        "workspace_bytes": workspace,
        "masks": heads,
        "expected": expected,
    });
    Ok(Outcome::new(out, json, true))
}

/// The rates of the GPUs to estimate for, and the name of this machine's where it was not measured.
fn rates(named: Option<&str>) -> (Vec<Rates>, Option<String>) {
    if let Some(named) = named {
        return (Rates::ALL.into_iter().filter(|rates| rates.gpu == named).collect(), None);
    }
    let at_hand = Gpu::name_of(0).ok();
    match at_hand.as_deref().and_then(Rates::of_device) {
        Some(rates) => (vec![rates], None),
        None => (Rates::ALL.into(), at_hand),
    }
}

fn text_of(layout: &Layout) -> String {
    let sides = [(layout.before, "first"), (layout.after, "last")].into_iter().filter(|&(tokens, _)| tokens > 0);
    sides.map(|(tokens, position)| format!(" + {tokens} text ({position})")).collect()
}

/// What a spec can gain over a dense layer of the same kernels on a GPU, or why it cannot gain, and
/// what to do about it.
fn gain_text(spec: &Spec, rates: &Rates, times: &LayerTimes) -> String {
    let over_dense = format!(
        "{:.2}x, estimated for an {}:\n  a layer {:.3} ms (pack {:.3}, profile {:.3}, second pack {:.3}, attention {:.3}), dense {:.3} ms\n",
        times.speedup(),
        rates.gpu.to_uppercase(),
        times.layer(),
        times.pack,
        times.profile,
        times.repack,
        times.sparse_attention,
        times.dense_layer()
    );
    match times.obstacle() {
        None => format!("\n  expected gain over framestride's own dense layer: {over_dense}"),
        Some(Obstacle::Density) => format!(
            "\n  this shape cannot gain: {over_dense}  Its masks (density {:.2}) leave {:.0}% of the time of dense attention; profiling pays below {:.0}%.\n  Take smaller half widths, or run it dense.\n",
            (spec.density(HeadType::Spatial) + spec.density(HeadType::Temporal)) / 2.0,
            100.0 * times.sparse_attention / times.dense_attention,
            100.0 * times.affordable_attention() / times.dense_attention
        ),
        Some(Obstacle::Tokens) => format!(
            "\n  this shape cannot gain: {over_dense}  Of {} tokens, attention is too short to pay for profiling, whatever the half widths.\n  Run it dense.\n",
            spec.layout.sequence()
        ),
    }
}
