//! What follows from a spec, without running anything.

use std::fmt;

use framestride_shapes::arch::Arch;
use framestride_shapes::dtype::Compute;
use framestride_shapes::estimate::{LayerTimes, MULTIPROCESSORS, Obstacle, Rates};
use framestride_shapes::layout::{HeadType, Layout};
use framestride_shapes::spec::Spec;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::plan::workspace_layout;

/// Sequence, tiles, half widths, exact densities, workspace and arithmetic of a spec, and what it
/// is estimated to gain over dense attention. It is shown as a text for people.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Description<'a> {
    /// What is described.
    pub spec: &'a Spec,
    /// Bytes of the workspace on an H100 or H200, for the spec's batch and heads.
    pub workspace_bytes: u64,
    /// The masks of [`HeadType::ALL`].
    pub masks: [MaskDescription; HeadType::ALL.len()],
    /// The times of a layer on each GPU that was asked for.
    pub times: Vec<(Rates, LayerTimes)>,
    /// The name of this machine's GPU, where there are no rates of it.
    pub unknown_gpu: Option<String>,
}

/// One mask of a spec.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MaskDescription {
    /// The type of a head that has it.
    pub head_type: HeadType,
    /// Its half width in tokens.
    pub half_width: u32,
    /// Visible pairs of a head, when all text is valid.
    pub visible_pairs: u128,
    /// Visible pairs over S².
    pub density: f64,
    /// Operations of the whole layer, if all heads had this type.
    pub flop: f64,
    /// Tiles of a head that attention skips.
    pub tiles_skipped: u64,
    /// Tiles that are seen whole.
    pub tiles_full: u64,
    /// Tiles that are seen in part.
    pub tiles_edge: u64,
}

impl Description<'_> {
    /// Describes a spec, with estimates for the GPU of a short name such as `h100`. Without one,
    /// they are for the first GPU of this machine, or for all there are rates of.
    ///
    /// # Errors
    /// An [`Error::Input`] for a GPU that there are no rates of.
    pub fn new<'a>(spec: &'a Spec, gpu: Option<&str>) -> Result<Description<'a>> {
        let (rates, unknown_gpu) = rates(gpu)?;
        let masks = HeadType::ALL.map(|head_type| {
            let tiles = spec.tile_counts(Arch::default(), head_type);
            MaskDescription {
                head_type,
                half_width: spec.layout.half_width(head_type),
                visible_pairs: spec.visible_pairs(head_type),
                density: spec.density(head_type),
                flop: spec.flops(head_type) as f64 * f64::from(spec.heads) * f64::from(spec.batch),
                tiles_skipped: tiles.skipped,
                tiles_full: tiles.full,
                tiles_edge: tiles.edge,
            }
        });
        let workspace_bytes = workspace_layout(spec, Arch::default(), spec.batch, spec.heads, MULTIPROCESSORS).bytes;
        let times = rates.into_iter().map(|rates| (rates, LayerTimes::estimate(spec, &rates))).collect();
        Ok(Description { spec, workspace_bytes, masks, times, unknown_gpu })
    }
}

impl fmt::Display for Description<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (spec, layout, tiles) = (self.spec, &self.spec.layout, self.spec.tiles(Arch::default()));
        writeln!(
            f,
            "{}\n  sequence   {} = {} frames x {} tokens{}; {} sink frames\n  heads      {} x {} {}{}, batch {}\n  tiles      {} query rows x {} key rows, {} stages\n  workspace  {:.1} MiB (on an H100 or H200)\n\n  {:<9} {:>10} {:>10} {:>12} {:>10} {:>10} {:>10}",
            spec.name,
            layout.sequence(),
            layout.frames.value,
            layout.tokens_per_frame.value,
            text_of(layout),
            layout.sink_frames,
            spec.heads,
            spec.head_dim,
            spec.dtype.as_str(),
            match (spec.compute, spec.largest_error) {
                (Compute::Dtype, _) => String::new(),
                (Compute::E4m3, None) => ", multiplied in 8 bits".into(),
                (Compute::E4m3, Some(error)) => format!(", multiplied in 8 bits where their error is at most {error}"),
            },
            spec.batch,
            tiles.query_rows,
            tiles.key_rows,
            tiles.stages,
            self.workspace_bytes as f64 / f64::from(1 << 20),
            "mask",
            "half width",
            "density",
            "TFLOP",
            "skipped",
            "full",
            "edge tiles",
        )?;
        for mask in &self.masks {
            writeln!(
                f,
                "  {:<9} {:>10} {:>10.6} {:>12.4} {:>10} {:>10} {:>10}",
                mask.head_type.name(),
                mask.half_width,
                mask.density,
                mask.flop / 1e12,
                mask.tiles_skipped,
                mask.tiles_full,
                mask.tiles_edge
            )?;
        }
        if spec.compute == Compute::E4m3 {
            writeln!(f, "\n  estimates are of 16 bits: there are no rates of 8")?;
        }
        if let Some(name) = &self.unknown_gpu {
            writeln!(f, "\n  there are no rates of the {name} of this machine")?;
        }
        self.times.iter().try_for_each(|(rates, times)| f.write_str(&gain_text(spec, rates, times)))
    }
}

/// The rates of the GPUs to estimate for, and the name of this machine's where it was not measured.
fn rates(named: Option<&str>) -> Result<(Vec<Rates>, Option<String>)> {
    if let Some(named) = named {
        let Some(rates) = Rates::ALL.into_iter().find(|rates| rates.gpu == named) else {
            let names = Rates::ALL.map(|rates| rates.gpu).join(", ");
            return Err(Error::input("gpu", named, names, "Name one of these, or none for the GPU of this machine"));
        };
        return Ok((vec![rates], None));
    }
    let at_hand = Gpu::name_of(0).ok();
    Ok(match at_hand.as_deref().and_then(Rates::of_device) {
        Some(rates) => (vec![rates], None),
        None => (Rates::ALL.into(), at_hand),
    })
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
