//! Each kernel against the f64 reference, on fresh random inputs, with poisoned outputs and workspace.
//!
//! Every check looks at rows one by one and reports the worst: its error and its tolerance ([`crate::tolerance`]), both relative to
//! the norm of the reference's row. So one wrong row among a hundred thousand is seen.

use std::sync::Arc;

use framestride_shapes::layout::{ATOM_ROWS, HeadType, PAD_ROWS};
use framestride_shapes::spec::{Dtype, NormOver, Spec};
use rand::RngExt;
use rayon::prelude::*;
use serde::Serialize;

use crate::attention::{HeadProfile, HeadTypes, SparseAttention, Workspace};
use crate::device::Stream;
use crate::error::Result;
use crate::inputs::{Inputs, row_generator, widen};
use crate::module::Module;
use crate::name_of;
use crate::place::{Arrangement, POISON, PlacedLayer};
use crate::reference::{Head, ProfileErrors, Reference, distance, norm};
use crate::tolerance;

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The kernel that made the result.
    pub kernel: &'static str,
    /// Head types, valid text, arrangement of inputs and output.
    pub case: String,
    /// What of the result was compared.
    pub quantity: &'static str,
    /// Relative error of the worst row (the one whose error is the largest part of its tolerance); null when not a number.
    pub rel_error: f64,
    /// Tolerance of that row.
    pub tolerance: f64,
    /// Whether every row is within its tolerance.
    pub ok: bool,
    /// Where the worst row is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub worst: String,
}

/// What `verify` found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether every check is.
    pub ok: bool,
    /// Where the kernels ran.
    pub device: String,
    /// Name of the spec.
    pub spec: String,
    /// Seed of the inputs.
    pub seed: u64,
    /// The checks.
    pub checks: Vec<Check>,
}

/// How much is compared.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Multiply-adds of the f64 reference that one case may cost; beyond it, query rows are drawn at random.
    pub reference_operations: f64,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { reference_operations: 1.5e9 }
    }
}

/// The types of the heads of one case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseTypes {
    /// All dense.
    Dense,
    /// All the same, given.
    All(HeadType),
    /// Dense, spatial, temporal in turn, given.
    Mixed,
    /// As the device finds them.
    Profiled,
}

/// How much text is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseText {
    /// All, and no lengths are given.
    Full,
    /// All, as given lengths.
    FullGiven,
    /// Some: another number for each batch item.
    Partial,
    /// None.
    Empty,
}

/// One run of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Types of the heads.
    pub types: CaseTypes,
    /// Valid text.
    pub text: CaseText,
    /// Q, K and V in memory.
    pub inputs: Arrangement,
    /// Output in memory.
    pub out: Arrangement,
    /// [`Inputs::planted`] instead of [`Inputs::random`].
    pub planted: bool,
}

impl Case {
    /// The cases of `verify`: each mask alone and all together, each arrangement, each length of text, profiling of random and of
    /// planted heads.
    pub fn all(has_text: bool) -> Vec<Case> {
        use Arrangement::{HeadsFirst, PackedQkv, TokensFirst, Unaligned};
        let case = |types, text, inputs, out| Case {
            types,
            text: if has_text { text } else { CaseText::Full },
            inputs,
            out,
            planted: false,
        };
        vec![
            case(CaseTypes::Dense, CaseText::Full, TokensFirst, TokensFirst),
            case(CaseTypes::All(HeadType::Spatial), CaseText::Partial, HeadsFirst, HeadsFirst),
            case(CaseTypes::All(HeadType::Temporal), CaseText::FullGiven, PackedQkv, TokensFirst),
            case(CaseTypes::Mixed, CaseText::Empty, Unaligned, Unaligned),
            case(CaseTypes::Profiled, CaseText::Partial, TokensFirst, HeadsFirst),
            Case { planted: true, ..case(CaseTypes::Profiled, CaseText::Full, TokensFirst, TokensFirst) },
        ]
    }

    fn describe(&self) -> String {
        let types = match self.types {
            CaseTypes::Dense => "dense",
            CaseTypes::All(head) => name_of(head),
            CaseTypes::Mixed => "mixed types",
            CaseTypes::Profiled if self.planted => "profiled, planted heads",
            CaseTypes::Profiled => "profiled",
        };
        let text = match self.text {
            CaseText::Full => "",
            CaseText::FullGiven => ", full text",
            CaseText::Partial => ", partial text",
            CaseText::Empty => ", no valid text",
        };
        let arrangement = |arrangement| match arrangement {
            Arrangement::TokensFirst => "[B,S,H,D]",
            Arrangement::HeadsFirst => "[B,H,S,D]",
            Arrangement::PackedQkv => "[B,S,3,H,D]",
            Arrangement::Unaligned => "unaligned",
        };
        format!("{types}{text}, {} to {}", arrangement(self.inputs), arrangement(self.out))
    }
}

/// Worst row so far.
struct Worst {
    rel_error: f64,
    tolerance: f64,
    place: String,
}

impl Worst {
    fn new() -> Worst {
        Worst { rel_error: 0.0, tolerance: 0.0, place: String::new() }
    }

    fn add(&mut self, rel_error: f64, tolerance: f64, place: impl FnOnce() -> String) {
        // Compared so that NaN is worse than anything, and stays.
        let part = |error: f64, tolerance: f64| if error == 0.0 { 0.0 } else { error / tolerance };
        let (new, old) = (part(rel_error, tolerance), part(self.rel_error, self.tolerance));
        if !old.is_nan() && (self.place.is_empty() || new.is_nan() || new > old) {
            *self = Worst { rel_error, tolerance, place: place() };
        }
    }

    fn merge(mut self, other: Worst) -> Worst {
        if !other.place.is_empty() {
            self.add(other.rel_error, other.tolerance, || other.place);
        }
        self
    }

    fn check(self, kernel: &'static str, case: &str, quantity: &'static str) -> Check {
        let Worst { rel_error, tolerance, place } = self;
        Check {
            kernel,
            case: case.to_owned(),
            quantity,
            rel_error,
            tolerance,
            ok: rel_error <= tolerance,
            worst: place,
        }
    }
}

/// Relative error of a row.
fn row_error(found: &[f64], reference: &[f64]) -> f64 {
    let (error, size) = (distance(found, reference), norm(reference));
    if error == 0.0 { 0.0 } else { error / size }
}

/// Runs all cases. `progress` hears what is being done, and how much of it.
pub fn verify(module: &Arc<Module>, seed: u64, effort: Effort, progress: &dyn Fn(&str, f64)) -> Result<Report> {
    let cases = Case::all(module.spec().layout.text_tokens > 0);
    let mut checks = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        progress(&case.describe(), index as f64 / cases.len() as f64);
        checks.extend(verify_case(module, case, seed.wrapping_add(1000 * index as u64), effort)?);
    }
    progress("done", 1.0);
    Ok(Report {
        ok: checks.iter().all(|check| check.ok),
        device: module.device().name(),
        spec: module.spec().name.clone(),
        seed,
        checks,
    })
}

/// One run of a layer, and every check on it.
pub fn verify_case(module: &Arc<Module>, case: &Case, seed: u64, effort: Effort) -> Result<Vec<Check>> {
    let (spec, device) = (module.spec(), module.device());
    let (batch, heads) = (spec.batch, spec.heads);
    let mut inputs = if case.planted {
        Inputs::planted(spec, batch as usize, heads as usize, seed)
    } else {
        Inputs::random(spec, batch as usize, heads as usize, seed)
    };
    let text = spec.layout.text_tokens;
    let mut generator = row_generator(seed, u64::MAX);
    inputs.text_lengths = match case.text {
        CaseText::Full => None,
        CaseText::FullGiven => Some(vec![text; batch as usize]),
        CaseText::Partial => Some((0..batch).map(|_| generator.random_range(0..text.max(1))).collect()),
        CaseText::Empty => Some(vec![0; batch as usize]),
    };
    let lengths = inputs.text_lengths.as_ref().filter(|_| case.text == CaseText::Partial);
    let name = match lengths {
        Some(lengths) => format!("{} (valid text {lengths:?})", case.describe()),
        None => case.describe(),
    };

    // The device's part.
    let attention = SparseAttention::new(module, batch, heads)?;
    let workspace = Workspace::allocate(device, attention.workspace_bytes())?;
    let Some(buffer) = workspace.buffer() else { return Ok(Vec::new()) };
    device.fill(buffer, POISON)?;
    let placed = PlacedLayer::upload(device, &inputs, case.inputs, case.out)?;
    let given: Option<Vec<HeadType>> = match case.types {
        CaseTypes::All(head) => Some(vec![head; (batch * heads) as usize]),
        CaseTypes::Mixed => Some((0..batch * heads).map(|head| HeadType::from_u32(head % 3)).collect()),
        CaseTypes::Dense | CaseTypes::Profiled => None,
    };
    let given_buffer = given
        .as_ref()
        .map(|types| device.upload(&types.iter().flat_map(|&head| (head as u32).to_le_bytes()).collect::<Vec<u8>>()))
        .transpose()?;
    let types = match (&given_buffer, case.types) {
        (Some(buffer), _) => HeadTypes::Given(buffer.address()),
        (None, CaseTypes::Dense) => HeadTypes::Dense,
        (None, _) => HeadTypes::Profiled,
    };
    // SAFETY: all memory is this function's, sized by the library, and outlives the work: the reads below wait for it.
    unsafe { attention.forward(Stream::DEFAULT, &placed.layer, types, &workspace)? };
    let profiles = attention.read_profile(&workspace)?;
    let (out, stray) = placed.out.download(device)?;
    let lse = placed.download_lse(device)?;
    let part = |range: &std::ops::Range<u64>| device.read(buffer, range.start, range.end - range.start);
    let plan = attention.plan();
    let packed = [part(&plan.packed_q)?, part(&plan.packed_k)?, part(&plan.packed_v)?];

    // The reference's.
    let reference = Reference::new(spec, &inputs);
    let mut packs = ["q", "k", "v"].map(|_| Worst::new());
    let (mut outputs, mut sums) = (Worst::new(), Worst::new());
    let (mut errors, mut selected) = (Worst::new(), Worst::new());
    let sequence = spec.layout.sequence() as usize;
    let operations_of_row = (sequence * spec.head_dim as usize * 2) as f64;
    let rows_of_head = (effort.reference_operations / operations_of_row / f64::from(batch * heads)).ceil() as usize;
    for (index, profile) in profiles.iter().enumerate() {
        let (item, head_index) = (profile.batch as usize, profile.head as usize);
        let head_type = given.as_ref().map_or(profile.head_type, |types| types[index]);
        let place = Place { item, head: head_index };
        let head = reference.head(item, head_index);
        let images = Images::of(&packed, index, sequence, spec.head_dim as usize, spec.dtype);
        compare_packed(spec, &inputs, &head, head_type, &images, place, &mut packs);

        // From here on the reference gets the numbers that the kernels read.
        let mask = head.mask(head_type);
        let queries = images.unpacked(0, &mask.query_order());
        let keys = images.unpacked(1, &mask.key_order());
        let head = Head::new(&spec.layout, head.head_dim, head.valid_text, queries, keys, head.values);
        let scale = inputs.scale();
        let rows: Vec<usize> = if rows_of_head >= sequence {
            (0..sequence).collect()
        } else {
            let mut rows: Vec<usize> = (0..rows_of_head).map(|_| generator.random_range(0..sequence)).collect();
            // Both ends of video and text are worth a look in any case.
            let text = text as usize;
            rows.extend([
                0,
                text.saturating_sub(1),
                text.min(sequence - 1),
                sequence - 1 - text.min(sequence - 1),
                sequence - 1,
            ]);
            rows
        };
        let (worst_out, worst_sum) = rows
            .par_iter()
            .map(|&row| {
                let expected = head.attend(head_type, row, scale);
                let (mut worst_out, mut worst_sum) = (Worst::new(), Worst::new());
                let tolerance = if expected.keys == 0 { 0.0 } else { tolerance::attention_row(spec.dtype, &expected) };
                let found = out.row(item, row, head_index);
                worst_out.add(row_error(&found, &expected.out), tolerance, || place.row(row));
                let found = f64::from(lse[(index * sequence) + row]);
                if expected.keys == 0 {
                    let error = if found == f64::NEG_INFINITY { 0.0 } else { f64::NAN };
                    worst_sum.add(error, 0.0, || place.row(row));
                } else {
                    let error = (found - expected.lse).exp_m1().abs();
                    worst_sum.add(error, tolerance::weight_sum(head.head_dim, &expected), || place.row(row));
                }
                (worst_out, worst_sum)
            })
            .reduce(|| (Worst::new(), Worst::new()), |a, b| (a.0.merge(b.0), a.1.merge(b.1)));
        outputs = outputs.merge(worst_out);
        sums = sums.merge(worst_sum);

        if case.types == CaseTypes::Profiled {
            let (seed, samples) = (spec.profile.seed, spec.profile.rows);
            let expected = head.profile(&spec.layout, scale, seed, index as u32, samples);
            compare_profile(spec, &expected, profile, case.planted, place, &mut errors, &mut selected);
        }
    }
    let mut checks = Vec::new();
    for (worst, operand) in packs.into_iter().zip(["packed q", "packed k", "packed v"]) {
        checks.push(worst.check("pack", &name, operand));
    }
    if case.types == CaseTypes::Profiled {
        checks.push(errors.check("profile", &name, "mean squared errors"));
        checks.push(selected.check("select", &name, "head types"));
    }
    checks.push(outputs.check("attention", &name, "output"));
    checks.push(sums.check("attention", &name, "log-sum-exp"));
    let mut around = Worst::new();
    around.add(stray as f64, 0.0, || "bytes around the output".into());
    checks.push(around.check("attention", &name, "bytes beside the output"));
    Ok(checks)
}

/// Packed images of Q, K and V of one head, decoded.
struct Images {
    /// Each `[packed_rows, head_dim]`, in packed order.
    rows: [Vec<f64>; 3],
    sequence: usize,
    head_dim: usize,
}

impl Images {
    fn of(packed: &[Vec<u8>; 3], index: usize, sequence: usize, head_dim: usize, dtype: Dtype) -> Images {
        let packed_rows = sequence.next_multiple_of(ATOM_ROWS as usize) + PAD_ROWS as usize;
        let bytes = packed_rows * head_dim * 2;
        let rows = packed.each_ref().map(|image| {
            let image = &image[index * bytes..][..bytes];
            (0..packed_rows * head_dim)
                .map(|element| {
                    // Atoms of 8 rows x 64 columns, whose 16-byte chunks stand at chunk ^ row.
                    let (row, d) = (element / head_dim, element % head_dim);
                    let atom = row / 8 * (head_dim / 64) + d / 64;
                    let place = atom * 1024 + row % 8 * 128 + ((d % 64 / 8) ^ (row % 8)) * 16 + d % 8 * 2;
                    widen(dtype, u16::from_le_bytes([image[place], image[place + 1]]))
                })
                .collect()
        });
        Images { rows, sequence, head_dim }
    }

    /// Q, K or V in the model's order. `order[packed row]` is the model's row.
    fn unpacked(&self, operand: usize, order: &[usize]) -> Vec<f64> {
        let mut rows = vec![0.0; self.sequence * self.head_dim];
        for (packed, &row) in order.iter().enumerate() {
            rows[row * self.head_dim..][..self.head_dim]
                .copy_from_slice(&self.rows[operand][packed * self.head_dim..][..self.head_dim]);
        }
        rows
    }
}

/// One head of one launch.
#[derive(Clone, Copy)]
struct Place {
    item: usize,
    head: usize,
}

impl Place {
    fn row(self, row: usize) -> String {
        format!("batch {}, head {}, row {row}", self.item, self.head)
    }
}

/// Every row of the packed images, padding and invalid text included, which must be zero.
fn compare_packed(
    spec: &Spec,
    inputs: &Inputs,
    head: &Head,
    head_type: HeadType,
    images: &Images,
    place: Place,
    worst: &mut [Worst; 3],
) {
    let dim = head.head_dim;
    let mask = head.mask(head_type);
    let orders = [mask.query_order(), mask.key_order(), mask.key_order()];
    let live = head.valid_text + (spec.layout.frames * spec.layout.tokens_per_frame) as usize;
    let exact = spec.qk_norm.is_none() && spec.rope.is_none();
    let over_heads = spec.qk_norm.as_ref().is_some_and(|norm| norm.over == NormOver::Heads);
    for (operand, worst) in worst.iter_mut().enumerate() {
        let given = [&head.queries, &head.keys, &head.values][operand];
        for (packed, found) in images.rows[operand].chunks_exact(dim).enumerate() {
            let Some(&row) = orders[operand][..live].get(packed) else {
                let error = if found.iter().all(|&x| x == 0.0) { 0.0 } else { f64::INFINITY };
                worst.add(error, 0.0, || format!("{} of the packed head, beyond what is valid", place.row(packed)));
                continue;
            };
            let expected = &given[row * dim..][..dim];
            // V is copied, and so are Q and K of a model without norm and RoPE.
            let tolerance = if operand == 2 || exact {
                0.0
            } else {
                let tokens = [&inputs.q, &inputs.k][operand];
                let input = if over_heads {
                    (0..tokens.heads).flat_map(|head| tokens.row(place.item, row, head)).collect()
                } else {
                    tokens.row(place.item, row, place.head)
                };
                tolerance::packed_row(spec, &input, expected)
            };
            worst.add(row_error(found, expected), tolerance, || place.row(row));
        }
    }
}

/// Errors of both masks, and the head type: the reference's where the two errors are further apart than their tolerances, the
/// lower of the device's own in any case, and the planted one where heads were planted.
fn compare_profile(
    spec: &Spec,
    expected: &ProfileErrors,
    found: &HeadProfile,
    planted: bool,
    place: Place,
    errors: &mut Worst,
    types: &mut Worst,
) {
    let found_errors = [found.spatial_error, found.temporal_error].map(f64::from);
    let mut tolerances = [0.0; 2];
    for mask in 0..2 {
        let error = (found_errors[mask].sqrt() - expected.errors[mask].sqrt()).abs() / expected.dense_rms;
        tolerances[mask] = tolerance::profile_error(spec.dtype, expected, mask + 1);
        let name = ["spatial", "temporal"][mask];
        errors.add(error, tolerances[mask], || format!("batch {}, head {}, {name} mask", place.item, place.head));
    }
    let gap = (expected.errors[0].sqrt() - expected.errors[1].sqrt()).abs() / expected.dense_rms;
    let clear = gap > tolerances[0] + tolerances[1];
    let own = if found_errors[1] < found_errors[0] { HeadType::Temporal } else { HeadType::Spatial };
    let plant = if place.head.is_multiple_of(2) { HeadType::Spatial } else { HeadType::Temporal };
    let wrong = found.head_type != own
        || (clear && found.head_type != expected.head_type())
        || (planted && found.head_type != plant);
    types.add(wrong.into(), 0.0, || format!("batch {}, head {}: {}", place.item, place.head, name_of(found.head_type)));
}
