//! Each kernel against the f64 reference, on fresh random inputs, with poisoned outputs and workspace.
//!
//! Every check looks at rows one by one and reports the worst: its error and its tolerance ([`crate::tolerance`]), both relative to
//! the norm of the reference's row. So one wrong row among a hundred thousand is seen.
//!
//! Of profiling, the sampled outputs and log-sum-exps under each mask are compared as **profile** leaves them, and what **select** makes
//! of them. Head types are to be those of the reference, where its two errors are further apart than their tolerances.
//!
//! The f64 reference of a whole layer at full size would take hours, so [`Effort`] decides how much of it is computed. A small
//! layer is compared whole. Of a large one, some heads are: all of their packed rows, then rows of their output drawn at random
//! and those at the ends of text, video and sink frames, and their profiling errors. Of every other head, packed rows are, drawn
//! likewise, with the whole padding, and the head type. That every row of the output was written, and nothing beside it, is seen
//! for all heads in any case.
//!
//! Whether a layer gives the same however it is launched comes last: [`crate::repeatability`]. What does not fit the memory that is free is
//! launched with fewer heads or batch items, and the report says so.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use framestride::device::Buffer;
use framestride::shapes::launch::{ProfilePlan, SAMPLE_ROWS, SCHEDULE_BYTES};
use framestride::shapes::layout::{ATOM_ROWS, HeadType, Layout, PAD_ROWS};
use framestride::shapes::spec::{Dtype, NormKind, NormOver, Profile, Spec};
use framestride::{Device, HeadProfile, HeadTypes, Module, Result, SparseAttention, Stream, Workspace};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::Serialize;

use crate::device_tensors::{Arrangement, POISON, PlacedLayer};
use crate::inputs::{Inputs, row_generator, widen};
use crate::memory::{self, Free};
use crate::reference::{Head, Mask, Operand, ProfileErrors, Reference, distance, norm};
use crate::{repeatability, tolerance};

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The kernel that made the result.
    pub kernel: &'static str,
    /// Head types, valid text, arrangement of inputs and output; or how the layer was launched.
    pub case: String,
    /// What of the result was compared.
    pub quantity: &'static str,
    /// How many rows, heads or runs were.
    pub compared: u64,
    /// How many there are.
    pub of: u64,
    /// What those numbers count: "rows", "heads", "counts" or "runs".
    pub unit: &'static str,
    /// Relative error of the worst row (the one whose error is the largest part of its tolerance), null when not a number; of what is
    /// counted, such as bytes that differ, the number.
    pub rel_error: f64,
    /// Tolerance of that row.
    pub tolerance: f64,
    /// Whether something was compared, and every row is within a tolerance that says something ([`tolerance::BLIND`]).
    pub ok: bool,
    /// Where the worst row is, and why it is not comparable if so.
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
    /// What was launched with fewer heads or batch items than it should have been, for want of memory.
    pub reduced: Vec<String>,
    /// The checks.
    pub checks: Vec<Check>,
}

/// How much is compared.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Multiply-adds of the f64 reference that one case may cost; beyond it, heads and query rows are drawn at random.
    pub reference_operations: f64,
}

impl Default for Effort {
    fn default() -> Effort {
        Effort { reference_operations: 6e9 }
    }
}

/// Query rows of a head that are compared at least: fewer would not be worth preparing the head.
const FEWEST_ROWS: usize = 32;

/// Comparing the packed rows of a head and widening them for the reference, in multiply-adds an element of the head: as measured.
const PREPARATION: f64 = 32.0;

/// Groups of [`ATOM_ROWS`] packed rows that are drawn of a head that is not compared whole.
const PACKED_GROUPS: usize = 4;

impl Effort {
    /// Heads to compare, and query rows of each. `profiled` rows of each head are profiled besides.
    fn share(self, sequence: usize, head_dim: usize, heads: usize, profiled: usize) -> (usize, usize) {
        let head = (sequence * head_dim) as f64;
        // Scores, and the product with V. Profiling has one pass of scores and three products, two of them with few keys.
        let row = 2.0 * head;
        let fixed = (PREPARATION + 3.0 * profiled as f64) * head;
        let affordable = self.reference_operations / (fixed + FEWEST_ROWS.min(sequence) as f64 * row);
        let heads = (affordable as usize).clamp(1, heads);
        let rows = (self.reference_operations / heads as f64 - fixed) / row;
        (heads, (rows as usize).max(FEWEST_ROWS).min(sequence))
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
    /// More than there is, which the kernels must take for all.
    Beyond,
}

impl CaseText {
    /// Valid text tokens of each batch item, of `text` that there are.
    fn lengths(self, text: u32, batch: u32, generator: &mut impl Rng) -> Option<Vec<u32>> {
        match self {
            CaseText::Full => None,
            CaseText::FullGiven => Some(vec![text; batch as usize]),
            CaseText::Partial => {
                // Different ones, as long as there are.
                let first = generator.random_range(0..text.max(1));
                Some((0..batch).map(|item| (first + item * (text / 2).max(1)) % text.max(1)).collect())
            }
            CaseText::Empty => Some(vec![0; batch as usize]),
            CaseText::Beyond => Some((0..batch).map(|item| [u32::MAX, text + 1][item as usize % 2]).collect()),
        }
    }
}

/// What Q, K and V hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseContent {
    /// [`Inputs::random`].
    Random,
    /// [`Inputs::sudden`].
    Sudden,
    /// [`Inputs::planted`].
    Planted,
    /// [`Inputs::rising`].
    Rising,
    /// [`Inputs::lone`].
    Lone,
    /// [`Inputs::hidden`].
    Hidden,
    /// [`Inputs::constant`].
    Constant,
    /// [`Inputs::edges`].
    Edges,
}

/// Batch and heads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaseShape {
    /// The spec's.
    Spec,
    /// Another batch, and fewer heads, where the spec allows it.
    Other,
}

/// One run of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Types of the heads.
    pub types: CaseTypes,
    /// Valid text.
    pub text: CaseText,
    /// What Q, K and V hold.
    pub content: CaseContent,
    /// Batch and heads.
    pub shape: CaseShape,
    /// Q, K and V in memory.
    pub inputs: Arrangement,
    /// Output in memory.
    pub out: Arrangement,
    /// Whether the log-sum-exp is asked for.
    pub lse: bool,
}

impl Case {
    /// All text valid, the spec's batch and heads, \[B, S, H, D\], with a log-sum-exp.
    pub const fn new(types: CaseTypes, content: CaseContent) -> Case {
        Case {
            types,
            text: CaseText::Full,
            content,
            shape: CaseShape::Spec,
            inputs: Arrangement::TokensFirst,
            out: Arrangement::TokensFirst,
            lse: true,
        }
    }

    /// The cases of `verify`: masks alone and all together, each arrangement, each length of text, another batch and fewer heads, and
    /// each content, those that are about the softmax's offsets with given types and profiled.
    ///
    /// With `is_emulated`, what is unaligned is scattered as well.
    pub fn all(has_text: bool, is_emulated: bool) -> Vec<Case> {
        use Arrangement::{HeadsFirst, PackedQkv};
        let unaligned = if is_emulated { Arrangement::Scattered } else { Arrangement::Unaligned };
        use CaseContent::{Constant, Edges, Hidden, Lone, Planted, Random, Rising, Sudden};
        use CaseText::{Beyond, Empty, FullGiven, Partial};
        use CaseTypes::{All, Dense, Mixed, Profiled};
        let cases = [
            Case { text: Empty, ..Case::new(Dense, Lone) },
            Case {
                text: Partial,
                shape: CaseShape::Other,
                inputs: HeadsFirst,
                out: HeadsFirst,
                ..Case::new(Mixed, Random)
            },
            Case { text: Beyond, inputs: PackedQkv, lse: false, ..Case::new(All(HeadType::Temporal), Random) },
            Case { text: Empty, inputs: unaligned, out: unaligned, ..Case::new(Mixed, Sudden) },
            Case { text: Partial, shape: CaseShape::Other, out: HeadsFirst, ..Case::new(Profiled, Random) },
            Case::new(Profiled, Planted),
            Case { text: Partial, ..Case::new(Mixed, Rising) },
            Case::new(Profiled, Rising),
            Case::new(Mixed, Edges),
            Case { text: Empty, ..Case::new(Profiled, Sudden) },
            Case { text: FullGiven, ..Case::new(Profiled, Constant) },
            Case { text: Empty, ..Case::new(Profiled, Hidden) },
        ];
        let text = |case: Case| Case { text: if has_text { case.text } else { CaseText::Full }, ..case };
        cases.map(text).into()
    }

    /// Batch and heads of the launch.
    pub fn extent(&self, spec: &Spec) -> [u32; 2] {
        let Spec { batch, heads, .. } = *spec;
        if self.shape == CaseShape::Spec {
            return [batch, heads];
        }
        let over_heads = spec.qk_norm.as_ref().is_some_and(|norm| norm.over == NormOver::Heads);
        if !over_heads && heads > 1 && (batch + 1) * (heads - 1) <= spec.most_launch_heads() {
            [batch + 1, heads - 1]
        } else if batch > 1 {
            [batch - 1, heads]
        } else {
            [if 2 * heads <= spec.most_launch_heads() { 2 } else { 1 }, heads]
        }
    }

    fn describe(&self) -> String {
        let types = match self.types {
            CaseTypes::Dense => "dense",
            CaseTypes::All(head) => head.name(),
            CaseTypes::Mixed => "mixed types",
            CaseTypes::Profiled => "profiled",
        };
        let content = match self.content {
            CaseContent::Random => "",
            CaseContent::Sudden => ", scores that are small but for one",
            CaseContent::Planted => ", planted heads",
            CaseContent::Rising => ", rising scores",
            CaseContent::Lone => ", lone rows that need offsets",
            CaseContent::Hidden => ", a hidden key above all",
            CaseContent::Constant => ", equal scores and constant values",
            CaseContent::Edges => ", keys at the edges above all",
        };
        let text = match self.text {
            CaseText::Full => "",
            CaseText::FullGiven => ", full text",
            CaseText::Partial => ", partial text",
            CaseText::Empty => ", no valid text",
            CaseText::Beyond => ", text lengths beyond the text",
        };
        let shape = if self.shape == CaseShape::Other { ", another batch and fewer heads" } else { "" };
        let lse = if self.lse { "" } else { ", no log-sum-exp" };
        let arrangement = |arrangement| match arrangement {
            Arrangement::TokensFirst => "[B,S,H,D]",
            Arrangement::HeadsFirst => "[B,H,S,D]",
            Arrangement::PackedQkv => "[B,S,3,H,D]",
            Arrangement::Unaligned => "unaligned",
            Arrangement::Scattered => "scattered",
        };
        format!("{types}{content}{text}{shape}{lse}, {} to {}", arrangement(self.inputs), arrangement(self.out))
    }
}

/// Worst row, or run, so far.
pub(crate) struct Worst {
    compared: u64,
    rel_error: f64,
    tolerance: f64,
    place: String,
}

impl Worst {
    pub(crate) fn new() -> Worst {
        Worst { compared: 0, rel_error: 0.0, tolerance: 0.0, place: String::new() }
    }

    pub(crate) fn add(&mut self, rel_error: f64, tolerance: f64, place: impl FnOnce() -> String) {
        self.compared += 1;
        self.keep_worse(rel_error, tolerance, place);
    }

    fn keep_worse(&mut self, rel_error: f64, tolerance: f64, place: impl FnOnce() -> String) {
        // Compared so that NaN is worse than anything, and stays. Next is what is not comparable.
        let part = |error: f64, tolerance: f64| match error {
            _ if tolerance >= tolerance::BLIND && !error.is_nan() => f64::INFINITY,
            0.0 => 0.0,
            _ => error / tolerance,
        };
        let (new, old) = (part(rel_error, tolerance), part(self.rel_error, self.tolerance));
        if !old.is_nan() && (self.place.is_empty() || new.is_nan() || new > old) {
            *self = Worst { rel_error, tolerance, place: place(), ..*self };
        }
    }

    fn merge(mut self, other: Worst) -> Worst {
        self.compared += other.compared;
        if !other.place.is_empty() {
            self.keep_worse(other.rel_error, other.tolerance, || other.place);
        }
        self
    }

    pub(crate) fn check(
        self,
        kernel: &'static str,
        case: &str,
        quantity: &'static str,
        (of, unit): (u64, &'static str),
    ) -> Check {
        let Worst { compared, rel_error, tolerance, place } = self;
        // Written so that NaN is not comparable either.
        let comparable = tolerance < tolerance::BLIND;
        let worst = if comparable { place } else { format!("{place}: not comparable, zeros are within the tolerance") };
        Check {
            kernel,
            case: case.to_owned(),
            quantity,
            compared,
            of,
            unit,
            rel_error,
            tolerance,
            ok: compared > 0 && comparable && rel_error <= tolerance,
            worst,
        }
    }
}

/// Relative error of a row.
fn row_error(found: &[f64], reference: &[f64]) -> f64 {
    let (error, size) = (distance(found, reference), norm(reference));
    if error == 0.0 { 0.0 } else { error / size }
}

/// Runs all cases, and launches in all ways. What memory they need is worked out before anything is allocated, and what does not fit is
/// launched with fewer heads. `progress` hears what is being done, and how much of it.
pub fn verify(module: &Arc<Module>, seed: u64, effort: Effort, progress: &dyn Fn(&str, f64)) -> Result<Report> {
    let (spec, device) = (module.spec(), module.device());
    let cases = Case::all(spec.layout.text_tokens > 0, matches!(device, Device::Emulator(_)));
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
        let wanted = case.extent(spec);
        let need = |extent| memory::compared(spec, device, extent, [case.inputs, case.out]);
        extents.push(free.fit(spec, wanted, need)?);
        note(case.describe(), extents[extents.len() - 1], wanted);
    }
    let launches = repeatability::Plan::new(spec, device, free)?;
    note("launches in several ways".into(), launches.extent, [spec.batch, spec.heads]);

    let mut checks = Vec::new();
    let part = |index: usize, part: f64| (index as f64 + part) / (cases.len() + 1) as f64;
    for (index, (case, extent)) in cases.iter().zip(extents).enumerate() {
        let name = case.describe();
        let progress = |done: f64| progress(&name, part(index, done));
        checks.extend(run_case(module, case, extent, seed.wrapping_add(1000 * index as u64), effort, &progress)?);
    }
    let seed_of_launches = seed.wrapping_add(1000 * cases.len() as u64);
    let progress_of_launches = |what: &str| progress(what, part(cases.len(), 0.0));
    checks.extend(repeatability::verify_launches(module, launches, seed_of_launches, &progress_of_launches)?);
    progress("done", 1.0);
    Ok(Report {
        ok: !checks.is_empty() && checks.iter().all(|check| check.ok),
        device: device.name(),
        spec: spec.name.clone(),
        seed,
        reduced,
        checks,
    })
}

/// One run of a layer, and every check on it.
pub fn verify_case(module: &Arc<Module>, case: &Case, seed: u64, effort: Effort) -> Result<Vec<Check>> {
    run_case(module, case, case.extent(module.spec()), seed, effort, &|_| ())
}

/// [`verify_case`] with a batch and a number of heads. `progress` hears how much is done.
fn run_case(
    module: &Arc<Module>,
    case: &Case,
    [batch, heads]: [u32; 2],
    seed: u64,
    effort: Effort,
    progress: &dyn Fn(f64),
) -> Result<Vec<Check>> {
    let (spec, device) = (module.spec(), module.device());
    let make = match case.content {
        CaseContent::Random => Inputs::random,
        CaseContent::Sudden => Inputs::sudden,
        CaseContent::Planted => Inputs::planted,
        CaseContent::Rising => Inputs::rising,
        CaseContent::Lone => Inputs::lone,
        CaseContent::Hidden => Inputs::hidden,
        CaseContent::Constant => Inputs::constant,
        CaseContent::Edges => Inputs::edges,
    };
    progress(0.0);
    let mut inputs = make(spec, batch as usize, heads as usize, seed);
    let text = spec.layout.text_tokens;
    let mut generator = row_generator(seed, u64::MAX);
    inputs.text_lengths = case.text.lengths(text, batch, &mut generator);
    let lengths = inputs.text_lengths.as_ref().filter(|_| case.text == CaseText::Partial);
    let name = match lengths {
        Some(lengths) => format!("{} (valid text {lengths:?})", case.describe()),
        None => case.describe(),
    };

    // The device's part.
    let attention = SparseAttention::new(module, batch, heads)?;
    let buffer = &device.allocate(attention.workspace_bytes())?;
    // SAFETY: the buffer outlives the workspace, and nobody else is given its memory.
    let workspace = unsafe { Workspace::borrow(device, buffer.address(), buffer.bytes()) };
    device.fill(Stream::DEFAULT, buffer, POISON)?;
    let mut placed = PlacedLayer::upload(device, &inputs, case.inputs, case.out)?;
    if !case.lse {
        placed.layer.lse = 0;
    }
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
    // SAFETY: all memory is this function's, sized by the library, and outlives the work: the reads below wait for it.
    unsafe { attention.forward(Stream::DEFAULT, &placed.layer, types, &workspace)? };
    let profiles = attention.read_profile(&workspace)?;
    let out = placed.out.read(device)?;
    let lse = placed.download_lse(device)?;
    let types = expected_types.unwrap_or_else(|| profiles.iter().map(|profile| profile.head_type).collect());

    // The reference's.
    let layout = &spec.layout;
    let (sequence, head_dim, all_heads) = (layout.sequence() as usize, spec.head_dim as usize, types.len());
    let profiled = if case.types == CaseTypes::Profiled { spec.profile.rows as usize } else { 0 };
    let plan = attention.plan();
    let (whole_heads, rows_of_head) = effort.share(sequence, head_dim, all_heads, profiled);
    let whole_heads = draw_heads(&types, whole_heads, &mut generator);
    let reference = Reference::new(spec, &inputs);
    let mut orders = HashMap::new();
    let mut packs = ["q", "k", "v"].map(|_| Worst::new());
    let (mut outputs, mut sums) = (Worst::new(), Worst::new());
    let mut sampled = Sampled::new(&spec.profile, all_heads);
    let mut choices = Vec::new();
    for (index, (profile, &head_type)) in profiles.iter().zip(&types).enumerate() {
        // Making inputs and running the kernels takes about half of the time.
        progress(0.5 + 0.5 * index as f64 / all_heads as f64);
        let place = Place { item: profile.batch as usize, head: profile.head as usize };
        let valid_text = inputs.valid_text(layout, place.item);
        let [queries, keys] = orders.entry((place.item, head_type as u32)).or_insert_with(|| {
            let mask = Mask::new(layout, head_type, valid_text);
            [mask.query_order(), mask.key_order()]
        });
        let order = [&queries[..], &keys[..], &keys[..]];
        let is_whole = whole_heads.contains(&index);
        let packed = PackedHead { reference: &reference, spec, inputs: &inputs, place, valid_text, order };
        let pieces = packed.draw_pieces(is_whole, &mut generator);
        let mut image = Vec::new();
        for (operand, part) in [&plan.packed_q, &plan.packed_k, &plan.packed_v].into_iter().enumerate() {
            for piece in &pieces {
                let row_bytes = head_dim as u64 * 2;
                let start = part.start + (index * packed.rows() + piece.start) as u64 * row_bytes;
                let bytes = device.read(buffer, start, piece.len() as u64 * row_bytes)?;
                let worst = std::mem::replace(&mut packs[operand], Worst::new());
                packs[operand] = worst.merge(packed.compare(operand, piece.start, &bytes));
                image.push(bytes);
            }
        }
        let mut clear = None;
        if is_whole {
            // From here on the reference gets the numbers that the kernels read.
            let [queries, keys] = [0, 1].map(|operand| packed.unpack(operand, &image[operand]));
            drop(image);
            let values = inputs.v.head(place.item, place.head);
            let head = Head::new(layout, head_dim, valid_text, queries, keys, values);
            let scale = inputs.scale();
            let rows = draw_rows(layout, valid_text, rows_of_head, &mut generator);
            let (worst_out, worst_sum) = rows
                .par_iter()
                .map(|&row| {
                    let expected = head.attend(head_type, row, scale);
                    let (mut worst_out, mut worst_sum) = (Worst::new(), Worst::new());
                    let tolerance =
                        if expected.keys == 0 { 0.0 } else { tolerance::attention_row(spec.dtype, &expected) };
                    let found = out.row(place.item, row, place.head);
                    worst_out.add(row_error(&found, &expected.out), tolerance, || place.row(row));
                    let found = f64::from(lse[(index * sequence) + row]);
                    if !case.lse {
                        // Only that nothing is written can be seen.
                    } else if expected.keys == 0 {
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
                let expected = head.profile(layout, scale, seed, index as u32, samples);
                let partials = Partials::read(device, buffer, &attention, index as u32)?;
                clear = Some(sampled.compare(spec.dtype, &expected, &partials, profile, place));
            }
        }
        choices.push(Choice { place, profile, clear });
    }
    let rows = |rows: usize| ((all_heads * rows) as u64, "rows");
    let heads = (all_heads as u64, "heads");
    let packed_rows = packed_rows(sequence);
    let mut checks = Vec::new();
    for (worst, operand) in packs.into_iter().zip(["packed q", "packed k", "packed v"]) {
        checks.push(worst.check("pack", &name, operand, rows(packed_rows)));
    }
    if case.types == CaseTypes::Profiled {
        checks.extend(sampled.checks(&name));
        let types = check_choices(&choices, case.content == CaseContent::Planted);
        checks.push(types.check("select", &name, "head types", heads));
    }
    checks.push(outputs.check("attention", &name, "output", rows(sequence)));
    if case.lse {
        checks.push(sums.check("attention", &name, "log-sum-exp", rows(sequence)));
    }
    // These see every row of every head.
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
    // The next attention on this workspace counts on from there, also one that no pack goes before.
    let schedule = device.read(buffer, plan.schedule.start, SCHEDULE_BYTES)?;
    let mut left = Worst::new();
    for word in schedule.chunks_exact(4) {
        let count = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        left.add(f64::from(count), 0.0, || "a count of the schedule".into());
    }
    checks.push(left.check("attention", &name, "counts left in the schedule", (SCHEDULE_BYTES / 4, "counts")));
    Ok(checks)
}

/// `count` heads, or a few more: the last, one of each type, and the rest at random.
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

/// All rows of the model's order when `count` is that many, else `count` of them at random and the ends of everything.
fn draw_rows(layout: &Layout, valid_text: usize, count: usize, generator: &mut impl Rng) -> Vec<usize> {
    let sequence = layout.sequence() as usize;
    if count >= sequence {
        return (0..sequence).collect();
    }
    let mut rows: BTreeSet<usize> = (0..count).map(|_| generator.random_range(0..sequence)).collect();
    let (frame, text) = (layout.tokens_per_frame as usize, layout.text_tokens as usize);
    let video = layout.first_video_row() as usize;
    let first_text = if video == 0 { sequence - text } else { 0 };
    let ends = [
        first_text,
        first_text + valid_text,
        first_text + text,
        video,
        video + layout.sink_frames as usize * frame,
        video + layout.frames as usize * frame,
    ];
    // The row before each end, and the row behind it.
    rows.extend(
        ends.into_iter().flat_map(|end| [end.checked_sub(1), Some(end)]).flatten().filter(|&row| row < sequence),
    );
    rows.into_iter().collect()
}

/// Rows of one packed head.
fn packed_rows(sequence: usize) -> usize {
    sequence.next_multiple_of(ATOM_ROWS as usize) + PAD_ROWS as usize
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

/// One head as it must lie in the packed images.
struct PackedHead<'a> {
    reference: &'a Reference<'a>,
    spec: &'a Spec,
    inputs: &'a Inputs,
    place: Place,
    valid_text: usize,
    /// The model's row of each packed row, of Q, K and V.
    order: [&'a [usize]; 3],
}

impl PackedHead<'_> {
    fn rows(&self) -> usize {
        packed_rows(self.order[0].len())
    }

    /// Packed rows that are neither padding nor invalid text.
    fn live(&self) -> usize {
        self.valid_text + (self.spec.layout.frames * self.spec.layout.tokens_per_frame) as usize
    }

    /// Ranges of packed rows, in whole groups of [`ATOM_ROWS`]: one of all, or some at random, both ends of the text, the end of
    /// the sink frames, and everything from the last row that counts.
    fn draw_pieces(&self, is_whole: bool, generator: &mut impl Rng) -> Vec<Range<usize>> {
        let (layout, group) = (&self.spec.layout, ATOM_ROWS as usize);
        let tail = if is_whole { 0 } else { self.live().saturating_sub(1) / group };
        let sinks = self.valid_text + (layout.sink_frames * layout.tokens_per_frame) as usize;
        let mut groups: BTreeSet<usize> = (0..PACKED_GROUPS).map(|_| generator.random_range(0..=tail)).collect();
        groups.extend(
            [0, self.valid_text.saturating_sub(1), self.valid_text, sinks.saturating_sub(1), sinks]
                .map(|row| row / group),
        );
        let pieces = groups.into_iter().filter(|&start| start < tail).map(|start| start * group..(start + 1) * group);
        pieces.chain(std::iter::once(tail * group..self.rows())).collect()
    }

    /// Compares packed rows of one operand from row `first`, a multiple of [`ATOM_ROWS`]. Padding and invalid text must be zero.
    fn compare(&self, operand: usize, first: usize, bytes: &[u8]) -> Worst {
        let dim = self.spec.head_dim as usize;
        let group = ATOM_ROWS as usize;
        bytes
            .par_chunks_exact(group * dim * 2)
            .enumerate()
            .with_min_len(4)
            .map_init(
                || vec![0.0; dim],
                |found, (index, bytes)| {
                    let mut worst = Worst::new();
                    for row in 0..group {
                        decode(self.spec.dtype, bytes, row, found);
                        self.compare_row(operand, first + index * group + row, found, &mut worst);
                    }
                    worst
                },
            )
            .reduce(Worst::new, Worst::merge)
    }

    fn compare_row(&self, operand: usize, packed: usize, found: &[f64], worst: &mut Worst) {
        let (spec, place) = (self.spec, self.place);
        let Some(&row) = self.order[operand][..self.live()].get(packed) else {
            let error = if found.iter().all(|&x| x == 0.0) { 0.0 } else { f64::INFINITY };
            return worst.add(error, 0.0, || format!("{} of the packed head, beyond what is valid", place.row(packed)));
        };
        let (tokens, expected) = match operand {
            0 => {
                let mut expected = self.reference.row(Operand::Query, place.item, row, place.head);
                expected.iter_mut().for_each(|x| *x *= self.inputs.query_scale());
                (&self.inputs.q, expected)
            }
            1 => (&self.inputs.k, self.reference.row(Operand::Key, place.item, row, place.head)),
            _ => (&self.inputs.v, self.inputs.v.row(place.item, row, place.head)),
        };
        // V is copied, and so is K of a model without norm and RoPE.
        let tolerance = if operand == 2 || (operand == 1 && spec.qk_norm.is_none() && spec.rope.is_none()) {
            0.0
        } else {
            // What the statistic was taken over.
            let over_heads = spec.qk_norm.as_ref().is_some_and(|norm| norm.over == NormOver::Heads);
            let heads = if over_heads { 0..tokens.heads } else { place.head..place.head + 1 };
            let input: Vec<f64> = match spec.qk_norm.as_ref().map(|norm| norm.kind) {
                Some(NormKind::Layer) => heads.flat_map(|head| tokens.row(place.item, row, head)).collect(),
                // The tolerance of any other does not depend on it.
                Some(NormKind::Rms) | None => Vec::new(),
            };
            tolerance::packed_row(spec, &input, &expected)
        };
        worst.add(row_error(found, &expected), tolerance, || place.row(row));
    }

    /// The whole image of Q (`operand` 0), without its scale, or K (1) as numbers, `[rows, head_dim]` in the model's order.
    fn unpack(&self, operand: usize, image: &[u8]) -> Vec<f64> {
        let (dim, order) = (self.spec.head_dim as usize, self.order[operand]);
        let mut packed_of = vec![0; order.len()];
        for (packed, &row) in order.iter().enumerate() {
            packed_of[row] = packed;
        }
        let group = ATOM_ROWS as usize;
        let mut rows = vec![0.0; order.len() * dim];
        rows.par_chunks_exact_mut(dim).zip(&packed_of).with_min_len(64).for_each(|(values, &packed)| {
            let bytes = &image[packed / group * group * dim * 2..][..group * dim * 2];
            decode(self.spec.dtype, bytes, packed % group, values);
            if operand == 0 {
                values.iter_mut().for_each(|x| *x /= self.inputs.query_scale());
            }
        });
        rows
    }
}

/// One row of a group of [`ATOM_ROWS`] packed rows: atoms of 8 rows x 64 columns, whose 16-byte chunks stand at chunk ^ row.
fn decode(dtype: Dtype, group: &[u8], row: usize, values: &mut [f64]) {
    for (chunk, values) in values.chunks_exact_mut(8).enumerate() {
        let place = chunk / 8 * 1024 + row * 128 + ((chunk % 8) ^ row) * 16;
        for (value, &bytes) in values.iter_mut().zip(group[place..][..16].as_chunks::<2>().0) {
            *value = widen(dtype, u16::from_le_bytes(bytes));
        }
    }
}

/// Partial results of profiling for one head ([`ProfilePlan`]), as f32.
struct Partials {
    plan: ProfilePlan,
    floats: Vec<f32>,
}

impl Partials {
    fn read(device: &Device, workspace: &Buffer, attention: &SparseAttention, head: u32) -> Result<Partials> {
        let plan = attention.profile_plan();
        let start = attention.plan().partials.start + plan.offset(head, 0, 0) * 4;
        let bytes = device.read(workspace, start, plan.offset(1, 0, 0) * 4)?;
        Ok(Partials { plan, floats: bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect() })
    }

    /// One sample's output and natural log-sum-exp under one mask, of all splits.
    fn merge(&self, sample: u32, mask: usize) -> (Vec<f64>, f64) {
        let (dim, row) = (self.plan.head_dim as usize, (sample % SAMPLE_ROWS) as usize);
        let splits: Vec<&[f32]> = (0..self.plan.splits)
            .map(|split| &self.floats[self.plan.offset(0, sample / SAMPLE_ROWS, split) as usize..])
            .collect();
        let place = self.plan.mask_offset(mask as u32) as usize;
        let [sums, outputs] = [1, 2].map(|part| place + part * SAMPLE_ROWS as usize);
        let offset = |split: &[f32]| f64::from(split[place + row]);
        let sum = |split: &[f32]| f64::from(split[sums + row]);
        // Splits of which the mask shows nothing count nothing, whatever their offset is.
        let largest = splits.iter().filter(|split| sum(split) != 0.0).map(|split| offset(split));
        let largest = largest.fold(f64::NEG_INFINITY, f64::max);
        let (mut out, mut total) = (vec![0.0; dim], 0.0);
        for split in splits {
            let weight = if sum(split) == 0.0 { 0.0 } else { (offset(split) - largest).exp2() };
            total += weight * sum(split);
            let values = &split[outputs + row * dim..][..dim];
            out.iter_mut().zip(values).for_each(|(out, &value)| *out += weight * f64::from(value));
        }
        out.iter_mut().for_each(|out| *out /= total);
        (out, (largest + total.log2()) * std::f64::consts::LN_2)
    }
}

/// What is compared of profiling, over all heads.
struct Sampled {
    samples: u32,
    heads: usize,
    outputs: Worst,
    sums: Worst,
    errors: Worst,
    merged: Worst,
}

impl Sampled {
    fn new(profile: &Profile, heads: usize) -> Sampled {
        let [outputs, sums, errors, merged] = std::array::from_fn(|_| Worst::new());
        Sampled { samples: profile.rows, heads, outputs, sums, errors, merged }
    }

    /// Compares one head with the reference. Gives the type that the reference chooses, if its two errors are further apart than their
    /// tolerances.
    fn compare(
        &mut self,
        dtype: Dtype,
        expected: &ProfileErrors,
        partials: &Partials,
        found: &HeadProfile,
        place: Place,
    ) -> Option<HeadType> {
        let name = |mask: usize| ["all keys", "spatial mask", "temporal mask"][mask];
        // Squared, over the samples under each mask: the distance of the merged output to the dense one, and its error.
        let (mut distances, mut moved) = ([0.0; 3], [0.0; 3]);
        for (sample, rows) in (0..).zip(&expected.rows) {
            let mut dense = Vec::new();
            for (mask, row) in rows.iter().enumerate() {
                let (out, lse) = partials.merge(sample, mask);
                let place = || format!("batch {}, head {}, sample {sample}, {}", place.item, place.head, name(mask));
                self.outputs.add(row_error(&out, &row.out), tolerance::sampled_row(dtype, rows, mask), place);
                self.sums.add((lse - row.lse).exp_m1().abs(), tolerance::weight_sum(row.out.len(), row), place);
                if mask == 0 {
                    dense.clone_from(&out);
                }
                moved[mask] += (tolerance::merged_row(partials.plan.splits, row) * norm(&out)).powi(2);
                distances[mask] += distance(&out, &dense).powi(2);
            }
        }
        let count = (expected.rows.len() * partials.plan.head_dim as usize) as f64;
        let root_mean = |square: f64| (square / count).sqrt();
        let size = expected.dense_rms.max(f64::MIN_POSITIVE);
        let mut tolerances = [0.0; 2];
        for (index, found) in [found.spatial_error, found.temporal_error].into_iter().enumerate() {
            let (mask, found) = (index + 1, f64::from(found).sqrt());
            let place = || format!("batch {}, head {}, {}", place.item, place.head, name(mask));
            tolerances[index] = tolerance::profile_error(dtype, expected, mask);
            let error = (found - expected.errors[index].sqrt()).abs() / size;
            self.errors.keep_worse(error, tolerances[index], place);
            let error = (found - root_mean(distances[mask])).abs() / size;
            // By the triangle inequality the distance of two rows moves by no more than both of them.
            let moved = root_mean(moved[0]) + root_mean(moved[mask]) + tolerance::root_mean(count) * found;
            self.merged.keep_worse(error, moved / size, place);
        }
        self.errors.compared += 1;
        self.merged.compared += 1;
        let gap = (expected.errors[0].sqrt() - expected.errors[1].sqrt()).abs() / size;
        (gap > tolerances[0] + tolerances[1]).then(|| expected.head_type())
    }

    fn checks(self, case: &str) -> [Check; 4] {
        let rows = (self.heads as u64 * u64::from(self.samples) * 3, "rows");
        let heads = (self.heads as u64, "heads");
        [
            self.outputs.check("profile", case, "sampled outputs", rows),
            self.sums.check("profile", case, "sampled log-sum-exps", rows),
            self.merged.check("select", case, "errors of the samples", heads),
            self.errors.check("select", case, "mean squared errors", heads),
        ]
    }
}

/// A head's type, as it was found.
struct Choice<'a> {
    place: Place,
    profile: &'a HeadProfile,
    /// What the reference chooses, where it was asked; then None if it cannot tell.
    clear: Option<Option<HeadType>>,
}

/// Types of heads: that of the device's own lower error in any case, and the reference's where it has one. Of planted heads without a
/// reference, those are to be of the planted type of whose kind the reference has seen some, and clearly found the planted type in all.
fn check_choices(choices: &[Choice], planted: bool) -> Worst {
    let plant = |place: Place| if place.head.is_multiple_of(2) { HeadType::Spatial } else { HeadType::Temporal };
    let is_plain = |kind: HeadType| {
        let mut seen = choices.iter().filter(|choice| plant(choice.place) == kind).filter_map(|choice| choice.clear);
        seen.next() == Some(Some(kind)) && seen.all(|clear| clear == Some(kind))
    };
    let plain = [HeadType::Spatial, HeadType::Temporal].into_iter().filter(|&kind| planted && is_plain(kind));
    let plain: Vec<HeadType> = plain.collect();
    let mut worst = Worst::new();
    for Choice { place, profile, clear } in choices {
        let own = if profile.temporal_error < profile.spatial_error { HeadType::Temporal } else { HeadType::Spatial };
        let expected = match clear {
            Some(clear) => *clear,
            None => Some(plant(*place)).filter(|kind| plain.contains(kind)),
        };
        let wrong = profile.head_type != own || expected.is_some_and(|expected| profile.head_type != expected);
        let name = profile.head_type.name();
        worst.add(wrong.into(), 0.0, || format!("batch {}, head {}: {name}", place.item, place.head));
    }
    worst
}
