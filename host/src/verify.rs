//! Each kernel against the f64 reference, on fresh random inputs, with poisoned outputs and workspace.
//!
//! Every check looks at rows one by one and reports the worst: its error and its tolerance ([`crate::tolerance`]), both relative to
//! the norm of the reference's row. So one wrong row among a hundred thousand is seen.
//!
//! The f64 reference of a whole layer at full size would take hours, so [`Effort`] decides how much of it is computed. A small
//! layer is compared whole. Of a large one, some heads are: all of their packed rows, then rows of their output drawn at random
//! and those at the ends of text, video and sink frames, and their profiling errors. Of every other head, packed rows are, drawn
//! likewise, with the whole padding, and the head type. That every row of the output was written, and nothing beside it, is seen
//! for all heads in any case.
//!
//! Whether a layer gives the same however it is launched comes last: [`crate::steady`].

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use framestride_shapes::layout::{ATOM_ROWS, HeadType, Layout, PAD_ROWS};
use framestride_shapes::spec::{Dtype, NormKind, NormOver, Spec};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::Serialize;

use crate::attention::{HeadProfile, HeadTypes, SparseAttention, Workspace};
use crate::device::Stream;
use crate::error::Result;
use crate::inputs::{Inputs, row_generator, widen};
use crate::module::Module;
use crate::place::{Arrangement, POISON, PlacedLayer};
use crate::reference::{Head, Mask, Operand, ProfileErrors, Reference, distance, norm};
use crate::{name_of, steady, tolerance};

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
    /// What those numbers count: "rows", "heads" or "runs".
    pub unit: &'static str,
    /// Relative error of the worst row (the one whose error is the largest part of its tolerance), null when not a number; of what is
    /// counted, such as bytes that differ, the number.
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
    /// Q, K and V in memory.
    pub inputs: Arrangement,
    /// Output in memory.
    pub out: Arrangement,
}

impl Case {
    /// The cases of `verify`: each mask alone and all together, each arrangement, each length of text, profiling of random and of
    /// planted heads, scores that outgrow the offsets of the softmax, and scores that need none until one of them is large.
    pub fn all(has_text: bool) -> Vec<Case> {
        use Arrangement::{HeadsFirst, PackedQkv, TokensFirst, Unaligned};
        let case = |types, text, inputs, out| Case {
            types,
            text: if has_text { text } else { CaseText::Full },
            inputs,
            out,
            content: CaseContent::Random,
        };
        vec![
            case(CaseTypes::Dense, CaseText::Full, TokensFirst, TokensFirst),
            case(CaseTypes::All(HeadType::Spatial), CaseText::Partial, HeadsFirst, HeadsFirst),
            case(CaseTypes::All(HeadType::Temporal), CaseText::FullGiven, PackedQkv, TokensFirst),
            Case { content: CaseContent::Sudden, ..case(CaseTypes::Mixed, CaseText::Empty, Unaligned, Unaligned) },
            case(CaseTypes::Profiled, CaseText::Partial, TokensFirst, HeadsFirst),
            Case {
                content: CaseContent::Planted,
                ..case(CaseTypes::Profiled, CaseText::Full, TokensFirst, TokensFirst)
            },
            Case {
                content: CaseContent::Rising,
                ..case(CaseTypes::Mixed, CaseText::Partial, TokensFirst, TokensFirst)
            },
            Case {
                content: CaseContent::Rising,
                ..case(CaseTypes::Profiled, CaseText::Full, TokensFirst, TokensFirst)
            },
            Case {
                content: CaseContent::Sudden,
                ..case(CaseTypes::Profiled, CaseText::Empty, TokensFirst, TokensFirst)
            },
        ]
    }

    fn describe(&self) -> String {
        let types = match self.types {
            CaseTypes::Dense => "dense",
            CaseTypes::All(head) => name_of(head),
            CaseTypes::Mixed => "mixed types",
            CaseTypes::Profiled => "profiled",
        };
        let content = match self.content {
            CaseContent::Random => "",
            CaseContent::Sudden => ", scores that are small but for one",
            CaseContent::Planted => ", planted heads",
            CaseContent::Rising => ", rising scores",
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
        format!("{types}{content}{text}, {} to {}", arrangement(self.inputs), arrangement(self.out))
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
        // Compared so that NaN is worse than anything, and stays.
        let part = |error: f64, tolerance: f64| if error == 0.0 { 0.0 } else { error / tolerance };
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
        Check {
            kernel,
            case: case.to_owned(),
            quantity,
            compared,
            of,
            unit,
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

/// Runs all cases, and launches in all ways. `progress` hears what is being done, and how much of it.
pub fn verify(module: &Arc<Module>, seed: u64, effort: Effort, progress: &dyn Fn(&str, f64)) -> Result<Report> {
    let cases = Case::all(module.spec().layout.text_tokens > 0);
    let mut checks = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        progress(&case.describe(), index as f64 / (cases.len() + 1) as f64);
        checks.extend(verify_case(module, case, seed.wrapping_add(1000 * index as u64), effort)?);
    }
    let part = cases.len() as f64 / (cases.len() + 1) as f64;
    let seed_of_launches = seed.wrapping_add(1000 * cases.len() as u64);
    checks.extend(steady::verify_launches(module, seed_of_launches, &|what| progress(what, part))?);
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
    let make = match case.content {
        CaseContent::Random => Inputs::random,
        CaseContent::Sudden => Inputs::sudden,
        CaseContent::Planted => Inputs::planted,
        CaseContent::Rising => Inputs::rising,
    };
    let mut inputs = make(spec, batch as usize, heads as usize, seed);
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
    let (mut errors, mut selected) = (Worst::new(), Worst::new());
    for (index, (profile, &head_type)) in profiles.iter().zip(&types).enumerate() {
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
        let mut expected_profile = None;
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
                expected_profile = Some(head.profile(layout, scale, seed, index as u32, samples));
            }
        }
        if case.types == CaseTypes::Profiled {
            compare_profile(
                spec,
                expected_profile.as_ref(),
                profile,
                case.content == CaseContent::Planted,
                place,
                &mut errors,
                &mut selected,
            );
        }
    }
    let rows = |rows: usize| ((all_heads * rows) as u64, "rows");
    let heads = (all_heads as u64, "heads");
    let packed_rows = packed_rows(sequence);
    let mut checks = Vec::new();
    for (worst, operand) in packs.into_iter().zip(["packed q", "packed k", "packed v"]) {
        checks.push(worst.check("pack", &name, operand, rows(packed_rows)));
    }
    if case.types == CaseTypes::Profiled {
        checks.push(errors.check("profile", &name, "mean squared errors", heads));
        checks.push(selected.check("select", &name, "head types", heads));
    }
    checks.push(outputs.check("attention", &name, "output", rows(sequence)));
    checks.push(sums.check("attention", &name, "log-sum-exp", rows(sequence)));
    // These see every row of every head.
    let poisoned_sums = lse.par_iter().filter(|sum| sum.to_le_bytes() == [POISON; 4]).count();
    for (count, quantity) in [
        (out.unwritten(), "unwritten output elements"),
        (poisoned_sums, "unwritten log-sum-exps"),
        (out.stray(), "bytes beside the output"),
    ] {
        let mut worst = Worst::new();
        worst.keep_worse(count as f64, 0.0, || quantity.into());
        worst.compared = (all_heads * sequence) as u64;
        checks.push(worst.check("attention", &name, quantity, rows(sequence)));
    }
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

/// Errors of both masks, where the reference has them, and the head type: the reference's where the two errors are further apart
/// than their tolerances, the lower of the device's own in any case, and the planted one where heads were planted.
fn compare_profile(
    spec: &Spec,
    expected: Option<&ProfileErrors>,
    found: &HeadProfile,
    planted: bool,
    place: Place,
    errors: &mut Worst,
    types: &mut Worst,
) {
    let mut clear = None;
    if let Some(expected) = expected {
        let found_errors = [found.spatial_error, found.temporal_error].map(f64::from);
        let mut tolerances = [0.0; 2];
        for mask in 0..2 {
            let error = (found_errors[mask].sqrt() - expected.errors[mask].sqrt()).abs() / expected.dense_rms;
            tolerances[mask] = tolerance::profile_error(spec.dtype, expected, mask + 1);
            let name = ["spatial", "temporal"][mask];
            let place = || format!("batch {}, head {}, {name} mask", place.item, place.head);
            errors.keep_worse(error, tolerances[mask], place);
        }
        errors.compared += 1;
        let gap = (expected.errors[0].sqrt() - expected.errors[1].sqrt()).abs() / expected.dense_rms;
        clear = (gap > tolerances[0] + tolerances[1]).then(|| expected.head_type());
    }
    let own = if found.temporal_error < found.spatial_error { HeadType::Temporal } else { HeadType::Spatial };
    let plant = if place.head.is_multiple_of(2) { HeadType::Spatial } else { HeadType::Temporal };
    let wrong = found.head_type != own
        || clear.is_some_and(|clear| found.head_type != clear)
        || (planted && found.head_type != plant);
    types.add(wrong.into(), 0.0, || format!("batch {}, head {}: {}", place.item, place.head, name_of(found.head_type)));
}
