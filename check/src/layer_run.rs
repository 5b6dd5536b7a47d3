//! One profiled sparse layer on given inputs, compared with the f64 reference: what
//! `framestride run` does.

use std::collections::BTreeSet;
use std::sync::Arc;

use framestride::launch::Kernel;
use framestride::shapes::blocks::Tiles;
use framestride::shapes::layout::{HeadType, Layout};
use framestride::shapes::spec::Dtype;
use framestride::shapes::tiling::query_tiles;
use framestride::{Error, HeadTypes, Module, Result, SparseAttention, Stream, Workspace};
use rand::RngExt;
use rayon::prelude::*;
use serde::Serialize;

use crate::compute_type::ComputeType;
use crate::device_tensors::{Arrangement, DeviceLayer, Placement};
use crate::random::row_generator;
use crate::reference::{Head, Reference, distance, norm};
use crate::tensors::{Inputs, Tokens};
use crate::tolerance;

/// One head's result.
#[derive(Clone, Debug, Serialize)]
pub struct HeadResult {
    /// Batch item.
    pub batch: u32,
    /// Head.
    pub head: u32,
    /// Mean squared error of the spatial mask against dense attention, over the sampled rows.
    pub spatial_error: f64,
    /// Mean squared error of the temporal mask.
    pub temporal_error: f64,
    /// The mask that was chosen, or "dense" where that was asked for.
    pub mask: &'static str,
    /// Bits in which the head multiplied: 8 or 16.
    pub bits: u32,
    /// What 8 bits change of the sampled rows ([`HeadPrecision::error`](framestride::HeadPrecision)),
    /// where the spec has a bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision_error: Option<f64>,
    /// Visible pairs of that mask over S².
    pub density: f64,
    /// ||out - reference|| / ||reference|| over the compared rows. The reference has the same mask.
    pub rel_error: f64,
    /// The part of it that rounding to the spec's type explains.
    pub tolerance: f64,
    /// The same error against dense attention, which is what the mask costs.
    pub dense_rel_error: f64,
    /// How many compared rows hold NaN or infinities because the inputs do. They are left out of
    /// the errors.
    ///
    /// One such value in K or V reaches every row that sees it. One in V may reach other rows that
    /// read its tile, since 0 x NaN is NaN.
    pub nan_rows: usize,
    /// Whether the error is within a tolerance below [`tolerance::BLIND`], and NaN and infinities
    /// are where the reference has them.
    pub ok: bool,
    /// Why it is not, where that is not the error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Time of one kernel.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// The kernel. Pack runs twice in a layer.
    pub kernel: &'static str,
    /// Its time in milliseconds.
    pub milliseconds: f64,
}

/// What a run of one layer found.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Whether every head is within its tolerance.
    pub ok: bool,
    /// Name of the spec.
    pub spec: String,
    /// Where the kernels ran.
    pub device: String,
    /// Shape of Q: batch items, tokens, heads, head_dim.
    pub shape: [usize; 4],
    /// How many query rows of each head were compared.
    pub compared_rows: usize,
    /// Mean density of the heads.
    pub density: f64,
    /// ||out - reference|| / ||reference|| over all heads.
    pub rel_error: f64,
    /// The elements of the inputs that are not finite, as [`Inputs::not_finite`] names them.
    pub not_finite: Vec<String>,
    /// The heads, batch item by batch item.
    pub heads: Vec<HeadResult>,
    /// The kernels in the order they ran.
    pub kernels: Vec<KernelTime>,
}

/// The report and the tensors of one layer.
pub struct LayerRun {
    /// The report, for people and machines.
    pub report: LayerReport,
    /// The output.
    pub out: Tokens,
    /// Log-sum-exp, `[B, H, S]`.
    pub lse: Vec<f32>,
    /// Head types, `[B, H]`.
    pub types: Vec<HeadType>,
}

/// Multiply-adds that the comparison with the reference may cost. Where all rows would cost more,
/// some are drawn at random.
const REFERENCE_OPERATIONS: f64 = 4e9;

/// Runs one layer and compares it with the reference.
///
/// `dense_heads` are dense in all batch items, whatever profiling finds. `progress` hears what is
/// being done, and the part of it that is done, 0 to 1, where that is known.
///
/// # Errors
/// Inputs that do not fit the spec, and whatever the device says.
pub fn run_layer(
    module: &Arc<Module>,
    inputs: &Inputs,
    dense_heads: &[u32],
    progress: &dyn Fn(&str, Option<f64>),
) -> Result<LayerRun> {
    let (spec, device) = (module.spec(), module.device());
    let [batch, sequence, heads, head_dim] = inputs.q.shape();
    inputs.check(spec, "inputs")?;
    check_dense_heads(dense_heads, heads, "dense heads")?;
    progress("inputs to the device", None);
    let attention = SparseAttention::new(module, batch as u32, heads as u32)?;
    let workspace = Workspace::allocate(device, attention.workspace_bytes())?;
    let text = [&inputs.before, &inputs.after].map(|text| text.is_apart.then_some(Arrangement::TokensFirst));
    let placement = Placement { text, ..Placement::all(Arrangement::TokensFirst) };
    let placed = DeviceLayer::upload(device, &spec.layout, inputs, placement)?;
    let dense = (HeadType::Dense as u32).to_le_bytes();
    let launches = attention.launches(&placed.layer, HeadTypes::Profiled, &workspace)?;
    let mut times = Vec::new();
    for launch in launches.in_order() {
        let kernel = launch.kernel();
        progress(kernel.entry(), None);
        // SAFETY: all memory is this function's, sized by the library, and outlives the work, which
        // is waited for.
        let milliseconds = device.time(Stream::DEFAULT, || unsafe { attention.launch(Stream::DEFAULT, launch) })?;
        times.push((kernel, milliseconds));
        // Select writes the types, and the second pack is the first to read them.
        if let (Kernel::Select, Some(buffer)) = (kernel, workspace.buffer()) {
            for index in (0..batch).flat_map(|item| dense_heads.iter().map(move |&head| item * heads + head as usize)) {
                device.write(buffer, attention.workspace_layout().head_types.start + index as u64 * 4, &dense)?;
            }
        }
    }
    let profiles = attention.read_profile(&workspace)?;
    let (out, _) = placed.out.download(device)?;
    let lse = placed.download_lse(device)?;

    let reference = Reference::new(spec, inputs);
    let operations_of_row = (sequence * head_dim * 4) as f64;
    let affordable = (REFERENCE_OPERATIONS / operations_of_row / (batch * heads) as f64).ceil() as usize;
    let rows = sampled_rows(affordable.max(16), sequence);
    let not_finite = inputs.not_finite(&module.spec().layout);
    let mut results = Vec::with_capacity(profiles.len());
    let (mut all_error, mut all_size) = (0.0, 0.0);
    for (index, profile) in profiles.iter().enumerate() {
        progress("comparing with the f64 reference", Some(index as f64 / profiles.len() as f64));
        let head = reference.head(profile.batch as usize, profile.head as usize);
        let precision = profile.precision.map_or(spec.compute, |precision| precision.compute);
        let compute = ComputeType::in_precision(spec, precision);
        let rounded = head.rounded(&spec.layout, compute, inputs.query_scale());
        let caught = if not_finite.is_empty() {
            BTreeSet::new()
        } else {
            rows_that_may_catch(
                &spec.layout,
                Tiles::new(module.arch(), spec.head_dim, precision),
                &head,
                profile.head_type,
            )
        };
        let sums = rows
            .par_iter()
            .map(|&row| {
                let found = out.row(profile.batch as usize, row, profile.head as usize);
                let may_catch = caught.contains(&row);
                compare_row(spec.dtype, &head, &rounded, profile.head_type, row, inputs.scale(), &found, may_catch)
            })
            .reduce(Sums::default, Sums::add);
        all_error += sums.error;
        all_size += sums.size;
        let (rel_error, tolerance) = (ratio(sums.error, sums.size), ratio(sums.tolerance, sums.size));
        let reason = if sums.wrong_nan > 0 {
            Some(format!("{} rows are finite where the reference is not, or the other way round", sums.wrong_nan))
        } else if sums.nan_rows == rows.len() {
            Some("nothing to compare: no row is finite, as the inputs are not".into())
        } else if tolerance >= tolerance::BLIND {
            Some(format!("not comparable: rounding alone may move the output by {tolerance:.1} times its size"))
        } else {
            None
        };
        let [spatial_error, temporal_error] = profile.errors.map(f64::from);
        results.push(HeadResult {
            batch: profile.batch,
            head: profile.head,
            spatial_error,
            temporal_error,
            mask: profile.head_type.name(),
            bits: precision.bits(),
            precision_error: profile.precision.map(|precision| precision.error.into()),
            density: spec.density(profile.head_type),
            rel_error,
            tolerance,
            dense_rel_error: ratio(sums.dense_error, sums.dense_size),
            nan_rows: sums.nan_rows,
            ok: reason.is_none() && rel_error <= tolerance,
            reason,
        });
    }
    progress("comparing with the f64 reference", Some(1.0));
    let report = LayerReport {
        ok: results.iter().all(|head| head.ok),
        spec: spec.name.clone(),
        device: device.name(),
        shape: inputs.q.shape(),
        compared_rows: rows.len(),
        density: results.iter().map(|head| head.density).sum::<f64>() / results.len() as f64,
        rel_error: ratio(all_error, all_size),
        not_finite,
        heads: results,
        kernels: times
            .iter()
            .map(|&(kernel, milliseconds)| KernelTime { kernel: kernel.entry(), milliseconds })
            .collect(),
    };
    Ok(LayerRun { report, out, lse, types: profiles.iter().map(|profile| profile.head_type).collect() })
}

/// Checks that all heads in `dense` exist, where there are `heads`. `subject` is what an error
/// calls them.
pub fn check_dense_heads(dense: &[u32], heads: usize, subject: &str) -> Result<()> {
    match dense.iter().find(|&&head| head as usize >= heads) {
        None => Ok(()),
        Some(head) => Err(Error::input(
            subject,
            format!("head {head}"),
            format!("0 to {}: there are {heads} heads", heads - 1),
            "Heads count from 0",
        )),
    }
}

/// The rows to compare: all of them, or `count` rows drawn from a fixed seed.
fn sampled_rows(count: usize, sequence: usize) -> Vec<usize> {
    if count >= sequence {
        return (0..sequence).collect();
    }
    let mut generator = row_generator(0, 0);
    let mut rows = BTreeSet::new();
    while rows.len() < count {
        rows.insert(generator.random_range(0..sequence));
    }
    rows.into_iter().collect()
}

/// The ratio of two norms, which are given squared. It is 0 where both are 0.
fn ratio(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { (part / whole).sqrt() }
}

/// Rows of the model's order that read a key tile with a value that is not finite, whether they see
/// that value or not.
fn rows_that_may_catch(layout: &Layout, tiles: Tiles, head: &Head, head_type: HeadType) -> BTreeSet<usize> {
    let mask = head.mask(head_type);
    let (queries, keys) = (mask.query_order(), mask.key_order());
    let sick = |row: usize| head.values[row * head.head_dim..][..head.head_dim].iter().any(|value| !value.is_finite());
    // The packed rows of invalid text are zero, whatever the tensor holds.
    let live = (head.valid.sum() + layout.video_tokens()) as usize;
    let sick: BTreeSet<usize> = (0..live).filter(|&packed| sick(keys[packed])).collect();
    query_tiles(layout, head_type, tiles, head.valid.sum())
        .filter(|tile| {
            let has_sick = |first: u32, rows: u32| sick.range(first as usize..(first + rows) as usize).next().is_some();
            tile.key_tiles.iter().any(|tile| has_sick(tile.first_row, tile.rows))
        })
        .flat_map(|tile| {
            (tile.first_row as usize..(tile.first_row + tile.rows) as usize).filter(|&row| row < queries.len())
        })
        .map(|packed| queries[packed])
        .collect()
}

/// Sums of squared norms over rows without NaN and infinities, and the numbers of rows with them.
#[derive(Default)]
struct Sums {
    nan_rows: usize,
    /// Rows among these of which only the reference has such values, or only the output without a
    /// reason.
    wrong_nan: usize,
    error: f64,
    size: f64,
    tolerance: f64,
    dense_error: f64,
    dense_size: f64,
}

impl Sums {
    fn add(self, other: Sums) -> Sums {
        Sums {
            nan_rows: self.nan_rows + other.nan_rows,
            wrong_nan: self.wrong_nan + other.wrong_nan,
            error: self.error + other.error,
            size: self.size + other.size,
            tolerance: self.tolerance + other.tolerance,
            dense_error: self.dense_error + other.dense_error,
            dense_size: self.dense_size + other.dense_size,
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn compare_row(
    dtype: Dtype,
    head: &Head,
    rounded: &Head,
    head_type: HeadType,
    row: usize,
    scale: f64,
    found: &[f64],
    may_catch: bool,
) -> Sums {
    let scores = head.scores(row, scale);
    let [expected, dense] = [head_type, HeadType::Dense].map(|mask| head.attend_scores(mask, row, scale, &scores));
    let nan = |row: &[f64]| row.iter().any(|x| !x.is_finite());
    if nan(found) || nan(&expected.out) {
        let right = nan(found) && (nan(&expected.out) || may_catch);
        return Sums { nan_rows: 1, wrong_nan: (!right).into(), ..Sums::default() };
    }
    // A key that the mask hides may have made the dense row NaN.
    let (dense_error, dense_size) =
        if nan(&dense.out) { (0.0, 0.0) } else { (distance(found, &dense.out), norm(&dense.out)) };
    let tolerance = match expected.keys {
        0 => 0.0,
        _ => {
            let attended = rounded.attend(head_type, row, scale);
            tolerance::layer_row(dtype, rounded.compute, &attended, distance(&attended.out, &expected.out))
        }
    };
    Sums {
        error: distance(found, &expected.out).powi(2),
        size: norm(&expected.out).powi(2),
        tolerance: tolerance * tolerance,
        dense_error: dense_error.powi(2),
        dense_size: dense_size.powi(2),
        ..Sums::default()
    }
}
