//! Each kernel against the f64 reference, on fresh random inputs, with outputs and workspace that
//! are poisoned before.
//!
//! Every check looks at rows one by one and reports the worst. Its error and its tolerance
//! ([`crate::tolerance`]) are relative to the norm of the reference's row. So one wrong row among a
//! hundred thousand is seen.
//!
//! **profile** is checked by the outputs and log-sum-exps of the sampled rows under each mask.
//! **select** is checked by what it makes of them. Head types must be those of the reference, where
//! its two errors are further apart than their tolerances.
//!
//! **judge** is checked by its errors, which are those of the outputs of **attention_e4m3** against what
//! **profile** left, and each precision by its error and the bound.
//!
//! For attention in 8 bits, the center of each head of V is compared too, and what rounding took
//! from V. Its images lie where those of profiling were. So the device profiles once more, and what
//! that leaves is compared.
//!
//! The f64 reference of a whole layer at full size would take hours, so [`Effort`] decides how much
//! of it is computed. A small layer is compared whole. Of a large layer, a check compares
//!
//! * in some heads all packed rows, the errors of profiling, and some rows of the output. These are
//!   the rows at the ends of text, video and sink frames, and others at random,
//! * in every other head some packed rows, drawn in the same way, the whole padding, and the head
//!   type,
//! * in all heads whether every row of the output was written, and nothing beside it.
//!
//! At last, a layer must give the same bytes however it is launched ([`crate::repeatability`]).
//! What does not fit the free memory is launched with fewer heads or batch items, and the report
//! says so.

mod cases;
mod packed_heads;
mod profiling;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

pub use cases::{Case, CaseContent, CaseExtent, CaseText, CaseTypes};
use framestride::device::Buffer;
use framestride::launch::{Launch, ProfiledKeys};
use framestride::shapes::arch::Products;
use framestride::shapes::blocks::ANCHOR_TILES;
use framestride::shapes::layout::{Divisor, HeadType, Layout, ValidText};
use framestride::shapes::params::SCHEDULE_BYTES;
use framestride::shapes::spec::{Compute, Dtype};
use framestride::{Device, HeadTypes, Layer, Module, Result, SparseAttention, Stream, Workspace};
use packed_heads::{DeviceCenter, HeadIndex, PackedHead, packed_rows};
use profiling::{Choice, Judged, Partials, Sampled, check_choices};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::Serialize;

use crate::checks::{Check, Checks, Worst, row_error};
use crate::compute_type::ComputeType;
use crate::device_tensors::{DeviceLayer, POISON};
use crate::memory_fit::{self, Free};
use crate::random::row_generator;
use crate::reference::{Attended, Head, Mask, Reference, distance, norm};
use crate::tensors::Inputs;
use crate::{repeatability, tolerance};

/// What `verify` found.
#[derive(Clone, Debug, Serialize)]
#[must_use]
pub struct VerifyReport {
    /// Whether every check passed.
    pub ok: bool,
    /// Where the kernels ran.
    pub device: String,
    /// The family of the kernels, as in `sm_80`.
    pub family: &'static str,
    /// Name of the spec.
    pub spec: String,
    /// Seed of the inputs.
    pub seed: u64,
    /// What had to be launched with fewer heads or batch items, since memory has no room for more.
    pub reduced: Vec<String>,
    /// The checks.
    pub checks: Checks,
}

/// How much is compared.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Multiply-adds of the f64 reference that one case may cost. A case that would cost more
    /// compares some heads and rows.
    pub reference_operations: f64,
    /// Whether no case is run after one of which a check failed.
    pub fail_fast: bool,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { reference_operations: 6e9, fail_fast: false }
    }
}

/// Query rows of a head that are compared at least. Fewer would not be worth preparing the head.
const FEWEST_ROWS: usize = 32;

/// The cost of comparing and widening the packed rows of a head, as measured, in multiply-adds for
/// each element.
const PREPARATION: f64 = 32.0;

impl Effort {
    /// How many heads are compared, and how many query rows of each. Besides, `profiled` rows of
    /// each head are profiled.
    fn share(self, sequence: usize, head_dim: usize, heads: usize, profiled: usize) -> (usize, usize) {
        let head = (sequence * head_dim) as f64;
        // A row costs its scores and its product with V. Profiling costs one pass of scores and
        // three products, of which two have few keys.
        let row = 2.0 * head;
        let fixed = (PREPARATION + 3.0 * profiled as f64) * head;
        let affordable = self.reference_operations / (fixed + FEWEST_ROWS.min(sequence) as f64 * row);
        let heads = (affordable as usize).clamp(1, heads);
        let rows = (self.reference_operations / heads as f64 - fixed) / row;
        (heads, (rows as usize).max(FEWEST_ROWS).min(sequence))
    }
}

/// Runs all cases, and launches a layer in all ways, unless [`Effort::fail_fast`] ends it.
///
/// The memory that all this needs is worked out before anything is allocated. `progress` hears what
/// is being done, and the part of everything that is done, 0 to 1.
pub fn verify(module: &Arc<Module>, seed: u64, effort: Effort, progress: &dyn Fn(&str, f64)) -> Result<VerifyReport> {
    let (spec, device) = (module.spec(), module.device());
    let cases = Case::all(&spec.layout, matches!(device, Device::Emulator(_)));
    let free = Free::of(device)?;
    let mut reduced = Vec::new();
    let mut note = |what: String, [batch, heads]: [u32; 2], wanted: [u32; 2]| {
        if [batch, heads] != wanted {
            let [all_items, all_heads] = wanted;
            reduced.push(format!("{what}: {batch} x {heads} heads of {all_items} x {all_heads}"));
        }
    };
    let mut extents = Vec::new();
    for case in &cases {
        let wanted = case.launch_extent(spec);
        let need = |extent| memory_fit::compared(spec, device, extent, case.placement);
        extents.push(free.fit(spec, wanted, need)?);
        note(case.describe(), extents[extents.len() - 1], wanted);
    }
    let launches = repeatability::Scope::new(spec, device, free)?;
    note("launches in several ways".into(), launches.extent, [spec.batch, spec.heads]);

    let part = |index: usize, part: f64| (index as f64 + part) / (cases.len() + 1) as f64;
    let run = |index: usize| {
        let (case, name) = (&cases[index], cases[index].describe());
        let progress = |done: f64| progress(&name, part(index, done));
        run_case(module, case, extents[index], seed.wrapping_add(1000 * index as u64), effort, &progress)
    };
    let mut checks = run(0)?;
    let goes_on = |checks: &Checks| checks.all_passed() || !effort.fail_fast;
    for index in 1..cases.len() {
        if goes_on(&checks) {
            checks.extend(run(index)?);
        }
    }
    if goes_on(&checks) {
        let seed = seed.wrapping_add(1000 * cases.len() as u64);
        let progress = |what: &str| progress(what, part(cases.len(), 0.0));
        checks.extend(repeatability::verify_launches(module, launches, seed, &progress)?);
    }
    progress("done", 1.0);
    Ok(VerifyReport {
        ok: checks.all_passed(),
        device: device.name(),
        family: module.arch().name,
        spec: spec.name.clone(),
        seed,
        reduced,
        checks,
    })
}

/// Runs a layer once, and checks everything that it left.
pub fn verify_case(module: &Arc<Module>, case: &Case, seed: u64, effort: Effort) -> Result<Checks> {
    run_case(module, case, case.launch_extent(module.spec()), seed, effort, &|_| ())
}

/// [`verify_case`] with a batch and a number of heads. `progress` hears the part of the case that
/// is done, 0 to 1.
fn run_case(
    module: &Arc<Module>,
    case: &Case,
    [batch, heads]: [u32; 2],
    seed: u64,
    effort: Effort,
    progress: &dyn Fn(f64),
) -> Result<Checks> {
    let (spec, device) = (module.spec(), module.device());
    progress(0.0);
    let mut inputs = case.content.make(spec, batch as usize, heads as usize, seed);
    let mut generator = row_generator(seed, u64::MAX);
    let mut name = case.describe();
    let sides = [(&mut inputs.before, spec.layout.before), (&mut inputs.after, spec.layout.after)];
    for ((side, (text, tokens)), valid) in Inputs::text_names(&spec.layout).into_iter().zip(sides).zip(case.text) {
        text.lengths = valid.lengths(tokens, batch, &mut generator);
        if let (CaseText::Partial, Some(lengths)) = (valid, &text.lengths) {
            name += &format!(" (valid {side} {lengths:?})");
        }
    }

    // Here the device does its part.
    let attention = SparseAttention::new(module, batch, heads)?;
    let buffer = &device.allocate(attention.workspace_bytes())?;
    // SAFETY: the buffer outlives the workspace, and nobody else is given its memory.
    let workspace = unsafe { Workspace::borrow(device, buffer.address(), buffer.bytes()) };
    device.fill(Stream::DEFAULT, buffer, POISON)?;
    let mut on_device = DeviceLayer::upload(device, &spec.layout, &inputs, case.placement)?;
    if !case.lse {
        on_device.layer.lse = 0;
    }
    let seed_of_rows = if case.seeded { seed } else { spec.profile.seed };
    on_device.layer.seed = case.seeded.then_some(seed_of_rows);
    let expected_types: Option<Vec<HeadType>> = match case.types {
        CaseTypes::Dense => Some(vec![HeadType::Dense; (batch * heads) as usize]),
        CaseTypes::All(head) => Some(vec![head; (batch * heads) as usize]),
        CaseTypes::Mixed => Some((0..batch * heads).map(|head| HeadType::from_u32(head % 3)).collect()),
        CaseTypes::Profiled => None,
    };
    let given = expected_types
        .as_ref()
        .filter(|_| case.types != CaseTypes::Dense)
        .map(|types| device.upload(&types.iter().flat_map(|&head| (head as u32).to_le_bytes()).collect::<Vec<u8>>()))
        .transpose()?;
    let types = match (&given, case.types) {
        (Some(buffer), _) => HeadTypes::Given(buffer.address()),
        (None, CaseTypes::Dense) => HeadTypes::Dense,
        (None, _) => HeadTypes::Profiled,
    };
    // Heads of each type have both precisions.
    let gives_precisions = spec.largest_error.is_some() && case.gives_precisions;
    let in_turn = (0..batch * heads).map(|head| Compute::ALL[1 - head as usize / 3 % 2]).collect::<Vec<_>>();
    let words = |bits: &[u32]| device.upload(&bits.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<u8>>());
    let given_precisions = match gives_precisions {
        true => Some(words(&in_turn.iter().map(|compute| compute.bits()).collect::<Vec<_>>())?),
        false => None,
    };
    on_device.layer.precisions = given_precisions.as_ref().map_or(0, Buffer::address);
    // SAFETY: all memory is this function's, sized by the library, and outlives the work: the reads
    // below wait for it.
    unsafe { attention.forward(Stream::DEFAULT, &on_device.layer, types, &workspace)? };
    let profiles = attention.read_profile(&workspace)?;
    let out = on_device.out.read(device)?;
    let lse = on_device.download_lse(device)?;
    let judges = spec.largest_error.is_some() && !gives_precisions && case.types == CaseTypes::Profiled;
    let precisions: Vec<Compute> = match (gives_precisions, spec.largest_error) {
        (true, _) => in_turn,
        (false, None) => vec![spec.compute; (batch * heads) as usize],
        (false, Some(_)) if !judges => vec![Compute::Dtype; (batch * heads) as usize],
        (false, Some(_)) => profiles.iter().filter_map(|profile| Some(profile.precision?.compute)).collect(),
    };
    let types = expected_types.unwrap_or_else(|| profiles.iter().map(|profile| profile.head_type).collect());

    // From here on its results are compared with the reference.
    let layout = &spec.layout;
    let (sequence, head_dim, all_heads) = (layout.sequence() as usize, spec.head_dim as usize, types.len());
    let profiled = if case.types == CaseTypes::Profiled { spec.profile.rows as usize } else { 0 };
    let plan = attention.workspace_layout();
    let (whole_heads, rows_of_head) = effort.share(sequence, head_dim, all_heads, profiled);
    let whole_heads = draw_heads(&types, whole_heads, &mut generator);
    let reference = Reference::new(spec, &inputs);
    let mut orders = HashMap::new();
    let mut packs = ["q", "k", "v"].map(|_| Worst::new());
    let mut packed_samples = Worst::new();
    let mut profiled_packs = ["k", "v"].map(|_| Worst::new());
    let (mut centers, mut lost) = (Worst::new(), Worst::new());
    let (mut outputs, mut sums) = (Worst::new(), Worst::new());
    let mut squares = Squares::default();
    let (mut mean_error, mut accumulated) = (MeanError::default(), 0);
    let mut sampled = Sampled::new(&spec.profile, all_heads);
    let mut choices = Vec::new();
    // The rows that are sampled of a head, and their image.
    let read_samples = |index: usize| -> Result<(Vec<usize>, Vec<u8>)> {
        let (samples, last) = (Divisor::new(spec.profile.rows), spec.profile.rows - 1);
        let row = |sample: u32| layout.sampled_video_row(seed_of_rows, index as u32, sample.min(last), samples);
        let rows: Vec<usize> =
            (0..spec.partials(1).group_rows()).map(|sample| (layout.before + row(sample)) as usize).collect();
        let bytes = rows.len() as u64 * u64::from(spec.image().bytes(1));
        let image = device.read(buffer, plan.samples.start + index as u64 * bytes, bytes)?;
        Ok((rows, image))
    };
    for (index, (profile, &head_type)) in profiles.iter().zip(&types).enumerate() {
        // Making inputs and running the kernels takes about half of the time.
        progress(0.5 + 0.5 * index as f64 / all_heads as f64);
        let at = HeadIndex { item: profile.batch as usize, head: profile.head as usize };
        let valid = inputs.valid(layout, at.item);
        let [queries, keys] = orders.entry((at.item, head_type as u32)).or_insert_with(|| {
            let mask = Mask::new(layout, head_type, valid);
            [mask.query_order(), mask.key_order()]
        });
        let order = [&queries[..], &keys[..], &keys[..]];
        let is_whole = whole_heads.contains(&index);
        let compute = ComputeType::in_precision(spec, precisions[index]);
        let center = match compute {
            ComputeType::Bf16 | ComputeType::F16 => None,
            ComputeType::E4m3 => {
                let start = plan.centers.start + index as u64 * DeviceCenter::BYTES;
                let center = DeviceCenter::new(&device.read(buffer, start, DeviceCenter::BYTES)?);
                center.compare(spec, valid, &inputs.v.head(at.item, at.head), || at.name(), &mut centers);
                Some(center)
            }
        };
        let packed =
            PackedHead { reference: &reference, spec, inputs: &inputs, index: at, valid, compute, center, order };
        let pieces = packed.draw_pieces(is_whole, &mut generator);
        let mut image = Vec::new();
        let parts = if compute == ComputeType::E4m3 { &plan.packed_e4m3 } else { &plan.packed };
        for (operand, part) in parts.iter().enumerate() {
            for piece in &pieces {
                let bytes = packed.read(device, buffer, part.start, index, piece.clone())?;
                let worst = std::mem::replace(&mut packs[operand], Worst::new());
                packs[operand] = worst.merge(packed.compare(operand, piece.start, &bytes));
                image.push(bytes);
            }
        }
        if is_whole {
            // From here on the reference gets the numbers that the kernels read.
            let unpacked = [0, 1, 2].map(|operand| packed.unpack(operand, &image[operand]));
            drop(image);
            let center = match &packed.center {
                None => vec![0.0; head_dim],
                Some(center) => {
                    packed.compare_lost(center, &mut lost);
                    center.added(packed.live())
                }
            };
            let head = Head::new(layout, compute, valid, unpacked, center);
            let scale = inputs.scale();
            let rows = draw_rows(layout, valid, rows_of_head, &mut generator);
            let (worst_out, worst_sum, of_head, mean_of_head, keys) = rows
                .par_iter()
                .map(|&row| {
                    let expected = head.attend(head_type, row, scale);
                    let (mut worst_out, mut worst_sum) = (Worst::new(), Worst::new());
                    let tolerance = match expected.keys {
                        0 => 0.0,
                        _ => tolerance::attention_row(spec.dtype, head.compute, &expected),
                    };
                    let found = out.row(at.item, row, at.head);
                    worst_out.add(row_error(&found, &expected.out), tolerance, || at.row(row));
                    let squares = Squares::of(&found, &expected, spec.dtype, head.compute);
                    let mean_error = MeanError::of(&found, &expected, spec.dtype);
                    let found = f64::from(lse[(index * sequence) + row]);
                    if !case.lse {
                        // All that can be seen is that nothing is written, below.
                    } else if expected.keys == 0 {
                        let error = if found == f64::NEG_INFINITY { 0.0 } else { f64::NAN };
                        worst_sum.add(error, 0.0, || at.row(row));
                    } else {
                        let error = (found - expected.lse).exp_m1().abs();
                        worst_sum.add(error, tolerance::weight_sum(head.compute, &expected), || at.row(row));
                    }
                    (worst_out, worst_sum, squares, mean_error, expected.keys)
                })
                .reduce(
                    || (Worst::new(), Worst::new(), Squares::default(), MeanError::default(), 0),
                    |a, b| (a.0.merge(b.0), a.1.merge(b.1), a.2.add(b.2), a.3.add(b.3), a.4.max(b.4)),
                );
            squares = squares.add(of_head);
            if compute != ComputeType::E4m3 {
                (mean_error, accumulated) = (mean_error.add(mean_of_head), accumulated.max(keys));
            }
            outputs = outputs.merge(worst_out);
            sums = sums.merge(worst_sum);
        }
        choices.push(Choice { index: at, profile, clear: None });
    }
    let mut judged_out = None;
    if judges {
        // What was judged may have been computed again in 16 bits. So all heads are computed in 8
        // bits.
        let eights = words(&vec![Compute::E4m3.bits(); all_heads])?;
        let given = words(&types.iter().map(|&head_type| head_type as u32).collect::<Vec<_>>())?;
        let layer = Layer { precisions: eights.address(), ..on_device.layer };
        // SAFETY: as above.
        unsafe { attention.forward(Stream::DEFAULT, &layer, HeadTypes::Given(given.address()), &workspace)? };
        judged_out = Some(on_device.out.read(device)?);
    }
    let mut judged = None;
    if case.types == CaseTypes::Profiled {
        // What attention reads may lie where profiling had something. So profiling is repeated. Its
        // images have the spatial order, and of Q there are only the sampled rows.
        let profiling = attention.profile_launches(&on_device.layer, &workspace)?;
        // SAFETY: as above.
        let launch = |launch: &Launch| unsafe { attention.launch(Stream::DEFAULT, launch) };
        let mut images = vec![[Vec::new(), Vec::new()]; whole_heads.len()];
        for ProfiledKeys { pack, profile, .. } in profiling.of_keys() {
            launch(pack)?;
            for (index, images) in whole_heads.iter().zip(&mut images) {
                let bytes = |rows: u32| u64::from(spec.image().bytes(rows));
                for (part, image) in [&plan.profiled_k, &plan.profiled_v].into_iter().zip(images) {
                    let start = part.start + *index as u64 * bytes(layout.packed_rows());
                    image.extend(device.read(buffer, start, bytes(plan.profiled_rows))?);
                }
            }
            launch(profile)?;
        }
        if let Some(out) = judged_out {
            judged = Some(Judged::compare(spec, device, buffer, &attention, &profiles, &out, seed_of_rows)?);
        }
        for (&index, images) in whole_heads.iter().zip(images) {
            let Choice { index: at, profile, clear } = &mut choices[index];
            let valid = inputs.valid(layout, at.item);
            let mask = Mask::new(layout, HeadType::Spatial, valid);
            let [queries, keys] = [mask.query_order(), mask.key_order()];
            let (compute, order) = (spec.dtype.into(), [&queries[..], &keys[..], &keys[..]]);
            let packed = PackedHead {
                reference: &reference,
                spec,
                inputs: &inputs,
                index: *at,
                valid,
                compute,
                center: None,
                order,
            };
            let mut unpacked = [(); 3].map(|()| vec![0.0; sequence * head_dim]);
            let (rows, image) = read_samples(index)?;
            packed.compare_samples(&rows, &image, &mut unpacked[0], &mut packed_samples);
            for ((operand, bytes), all) in (1..).zip(images).zip(&mut profiled_packs) {
                let worst = std::mem::replace(all, Worst::new());
                *all = worst.merge(packed.compare(operand, 0, &bytes));
                unpacked[operand] = packed.unpack(operand, &bytes);
            }
            let head = Head::new(layout, compute, valid, unpacked, vec![0.0; head_dim]);
            let expected = head.profile(layout, inputs.scale(), seed_of_rows, index as u32, spec.profile.rows);
            let partials = Partials::read(device, buffer, &attention, index as u32)?;
            *clear = Some(sampled.compare(spec.dtype, &expected, &partials, profile, *at));
        }
    }
    let rows = |rows: usize| ((all_heads * rows) as u64, "rows");
    let heads = (all_heads as u64, "heads");
    let packed_rows = packed_rows(sequence);
    let [q, k, v] = packs;
    let pack = |worst: Worst, quantity| worst.check("pack", &name, quantity, rows(packed_rows));
    let mut checks = Checks::new(pack(q, "packed q"), [pack(k, "packed k"), pack(v, "packed v")]);
    if precisions.contains(&Compute::E4m3) {
        checks.push(centers.check("center", &name, "centers of v", heads));
        checks.push(lost.check("pack_values", &name, "what rounding took from v", heads));
    }
    if case.types == CaseTypes::Profiled {
        let samples = spec.partials(1).group_rows() as usize;
        checks.push(packed_samples.check("pack", &name, "sampled rows of q", rows(samples)));
        let [k, v] = profiled_packs;
        checks.extend([pack(k, "profiled k"), pack(v, "profiled v")]);
        checks.extend(sampled.checks(&name));
        let types = check_choices(&choices, case.content == CaseContent::Planted);
        checks.push(types.check("select", &name, "head types", heads));
    }
    if let Some(Judged { errors, precisions }) = judged {
        checks.push(errors.check("judge", &name, "errors of 8 bits", heads));
        checks.push(precisions.check("judge", &name, "precisions", heads));
    }
    checks.push(outputs.check("attention", &name, "output", rows(sequence)));
    if matches!(case.content, CaseContent::Random | CaseContent::OffCentre | CaseContent::Drifting) {
        checks.push(squares.check(&name, (all_heads * sequence) as u64));
    }
    if case.content == CaseContent::OffCentre && mean_error.rows > 0 {
        // Elsewhere an accumulator has all keys.
        let together = match module.arch().products {
            Products::Wgmma => accumulated.min((ANCHOR_TILES * spec.tiles(module.arch()).key_rows) as usize),
            Products::MmaSync => accumulated,
        };
        let bound = tolerance::mean_error(spec.dtype.into(), together);
        checks.push(mean_error.check(&name, bound, (all_heads * sequence) as u64));
    }
    if case.lse {
        checks.push(sums.check("attention", &name, "log-sum-exp", rows(sequence)));
    }
    // The next checks see every row of every head.
    let poisoned_sums = lse.par_iter().filter(|sum| sum.to_le_bytes() == [POISON; 4]).count();
    for (count, quantity) in [
        (out.unwritten(), "unwritten output elements"),
        if case.lse {
            (poisoned_sums, "unwritten log-sum-exps")
        } else {
            (lse.len() - poisoned_sums, "log-sum-exps that nobody asked for")
        },
        (out.stray(), "bytes beside the output"),
    ] {
        let mut worst = Worst::new();
        worst.keep_worse(count as f64, 0.0, || quantity.into());
        worst.compared = (all_heads * sequence) as u64;
        checks.push(worst.check("attention", &name, quantity, rows(sequence)));
    }
    // The next attention on this workspace goes on from these counts, even without a pack before
    // it.
    let schedule = device.read(buffer, plan.schedule.start, SCHEDULE_BYTES)?;
    let mut left = Worst::new();
    for word in schedule.chunks_exact(4) {
        let count = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        left.add(f64::from(count), 0.0, || "a count of the schedule".into());
    }
    checks.push(left.check("attention", &name, "counts left in the schedule", (SCHEDULE_BYTES / 4, "counts")));
    Ok(checks)
}

/// Sums over rows of outputs.
///
/// A bound of the worst row has to allow for much more than most rows have. What all rows have
/// together shows a rounding too many.
#[derive(Clone, Copy, Default)]
struct Squares {
    rows: u64,
    /// Of squared errors.
    error: f64,
    /// Of what these are expected to be.
    expected: f64,
    /// Of the squares of that, twice: the variance of the sum, where one key has most of a row's
    /// weight, so that its elements have their errors in common.
    variance: f64,
    /// Of squared norms.
    size: f64,
}

impl Squares {
    fn of(found: &[f64], row: &Attended, dtype: Dtype, compute: ComputeType) -> Squares {
        let expected = tolerance::expected_error(dtype, compute, row).powi(2);
        let (error, size) = (distance(found, &row.out).powi(2), norm(&row.out).powi(2));
        Squares { rows: 1, error, expected, variance: 2.0 * expected * expected, size }
    }

    fn add(self, other: Squares) -> Squares {
        Squares {
            rows: self.rows + other.rows,
            error: self.error + other.error,
            expected: self.expected + other.expected,
            variance: self.variance + other.variance,
            size: self.size + other.size,
        }
    }

    fn check(self, case: &str, of: u64) -> Check {
        let relative = |square: f64| (square / self.size.max(f64::MIN_POSITIVE)).sqrt();
        let most = tolerance::OF_EXPECTED.powi(2) * self.expected + tolerance::DEVIATIONS * self.variance.sqrt();
        let mut worst = Worst::new();
        worst.keep_worse(relative(self.error), relative(most), || "all compared rows together".into());
        worst.compared = self.rows;
        worst.check("attention", case, "output as a whole", (of, "rows"))
    }
}

/// How much the output is too large on the whole, where V has a mean. It is compared with the
/// rounded reference, so that rounding both alike makes no error.
#[derive(Clone, Copy, Default)]
struct MeanError {
    rows: u64,
    /// Of errors, positive where an element is too large.
    error: f64,
    /// Of their squares, each of a whole row: elements of a row share errors of its weights.
    squares: f64,
    /// Of sizes.
    size: f64,
}

impl MeanError {
    fn of(found: &[f64], row: &Attended, dtype: Dtype) -> MeanError {
        let error = |(found, out): (&f64, &f64)| (found - ComputeType::from(dtype).round(*out)) * out.signum();
        let error: f64 = found.iter().zip(&row.out).map(error).sum();
        let size = row.out.iter().map(|out| out.abs()).sum();
        MeanError { rows: 1, error, squares: error * error, size }
    }

    fn add(self, other: MeanError) -> MeanError {
        MeanError {
            rows: self.rows + other.rows,
            error: self.error + other.error,
            squares: self.squares + other.squares,
            size: self.size + other.size,
        }
    }

    /// `bound` is that of what is no chance.
    fn check(self, case: &str, bound: f64, of: u64) -> Check {
        let size = self.size.max(f64::MIN_POSITIVE);
        let chance = tolerance::DEVIATIONS_OF_A_MEAN * self.squares.sqrt() / size;
        let mut worst = Worst::new();
        worst.keep_worse(self.error.abs() / size, bound + chance, || "all compared rows together".into());
        worst.compared = self.rows;
        worst.check("attention", case, "mean error of the output", (of, "rows"))
    }
}

/// Draws `count` heads, or a few more: the last head, one of each type, and others at random.
fn draw_heads(types: &[HeadType], count: usize, generator: &mut impl Rng) -> BTreeSet<usize> {
    let order = rand::seq::index::sample(generator, types.len(), types.len()).into_vec();
    let of_type = |head_type| order.iter().copied().find(|&head| types[head] == head_type);
    let mut heads: BTreeSet<usize> = HeadType::ALL.into_iter().filter_map(of_type).collect();
    heads.extend(types.len().checked_sub(1));
    for head in order {
        if heads.len() >= count {
            break;
        }
        heads.insert(head);
    }
    heads
}

/// Draws rows of the model's order: all, when `count` is that many, else `count` at random and
/// those at the ends of everything.
fn draw_rows(layout: &Layout, valid: ValidText, count: usize, generator: &mut impl Rng) -> Vec<usize> {
    let sequence = layout.sequence() as usize;
    if count >= sequence {
        return (0..sequence).collect();
    }
    let mut rows: BTreeSet<usize> = (0..count).map(|_| generator.random_range(0..sequence)).collect();
    let frame = layout.tokens_per_frame.value;
    let (video, behind) = (layout.before, layout.before + layout.frames.value * frame);
    let ends = [0, valid.before, video, video + layout.sink_frames * frame, behind, behind + valid.after];
    let ends = ends.map(|end| end as usize);
    // Each end has a row before it and a row behind it.
    rows.extend(
        ends.into_iter().flat_map(|end| [end.checked_sub(1), Some(end)]).flatten().filter(|&row| row < sequence),
    );
    rows.into_iter().collect()
}
