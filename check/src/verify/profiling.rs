//! What the kernels profile and select leave, compared with the reference.

use framestride::device::Buffer;
use framestride::shapes::blocks::SAMPLE_ROWS;
use framestride::shapes::layout::{Divisor, HeadType};
use framestride::shapes::params::PartialsLayout;
use framestride::shapes::spec::{Compute, Dtype, Profile, Spec};
use framestride::{Device, HeadPrecision, HeadProfile, Result, SparseAttention};

use super::packed_heads::HeadIndex;
use crate::checks::{Check, Worst, row_error};
use crate::device_tensors::HostCopy;
use crate::reference::{ProfileErrors, distance, least, norm};
use crate::tolerance;

/// Partial results of profiling for one head, where [`PartialsLayout`] says that they lie.
pub struct Partials {
    layout: PartialsLayout,
    floats: Vec<f32>,
}

impl Partials {
    /// Copies the results of head `head`, counted over batch x heads, to the host.
    pub fn read(device: &Device, workspace: &Buffer, attention: &SparseAttention, head: u32) -> Result<Partials> {
        let layout = attention.partials();
        let start = attention.workspace_layout().partials.start + layout.offset(head, 0, 0) * 4;
        let bytes = device.read(workspace, start, layout.offset(1, 0, 0) * 4)?;
        Ok(Partials { layout, floats: bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect() })
    }

    /// One sample's output and natural log-sum-exp under one mask, merged over all splits.
    fn merge(&self, sample: u32, mask: HeadType) -> (Vec<f64>, f64) {
        let (dim, row) = (self.layout.head_dim as usize, (sample % SAMPLE_ROWS) as usize);
        let splits: Vec<&[f32]> = (0..self.layout.splits)
            .map(|split| &self.floats[self.layout.offset(0, sample / SAMPLE_ROWS, split) as usize..])
            .collect();
        let first = self.layout.mask_offset(mask as u32) as usize;
        let [sums, outputs] = [1, 2].map(|part| first + part * SAMPLE_ROWS as usize);
        let offset = |split: &[f32]| f64::from(split[first + row]);
        let sum = |split: &[f32]| f64::from(split[sums + row]);
        // A split of which the mask shows nothing counts nothing, whatever its offset is.
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

impl Partials {
    /// The largest logarithm with which a sample is merged under one mask.
    fn logarithms(&self, sample: u32, mask: HeadType) -> f64 {
        let first = self.layout.mask_offset(mask as u32) + sample % SAMPLE_ROWS;
        let of_split = |split| {
            let floats =
                &self.floats[(self.layout.offset(0, sample / SAMPLE_ROWS, split) + u64::from(first)) as usize..];
            let (offset, sum) = (f64::from(floats[0]), f64::from(floats[SAMPLE_ROWS as usize]));
            if sum == 0.0 { 0.0 } else { offset.abs() + sum.log2().abs() }
        };
        (0..self.layout.splits).map(of_split).fold(0.0, f64::max)
    }
}

/// What was compared of profiling so far, over all heads.
pub struct Sampled {
    samples: u32,
    heads: usize,
    outputs: Worst,
    sums: Worst,
    errors: Worst,
    merged: Worst,
}

impl Sampled {
    /// Nothing is compared yet of `heads` heads.
    pub fn new(profile: &Profile, heads: usize) -> Sampled {
        let [outputs, sums, errors, merged] = std::array::from_fn(|_| Worst::new());
        Sampled { samples: profile.rows, heads, outputs, sums, errors, merged }
    }

    /// Compares one head with the reference. Gives the type that the reference chooses, or none
    /// where its errors are no further apart than their tolerances.
    pub fn compare(
        &mut self,
        dtype: Dtype,
        expected: &ProfileErrors,
        partials: &Partials,
        found: &HeadProfile,
        index: HeadIndex,
    ) -> Option<HeadType> {
        let name = |mask: HeadType| match mask {
            HeadType::Dense => "all keys".into(),
            mask => format!("{} mask", mask.name()),
        };
        // Sums of squares over the samples, under each mask: the distance of the merged output to
        // the dense one, and its error.
        let (mut distances, mut moved) = ([0.0; HeadType::ALL.len()], [0.0; HeadType::ALL.len()]);
        for (sample, rows) in (0..).zip(&expected.rows) {
            let mut dense = Vec::new();
            for (mask, row) in HeadType::ALL.into_iter().zip(rows) {
                let (out, lse) = partials.merge(sample, mask);
                let location = || format!("batch {}, head {}, sample {sample}, {}", index.item, index.head, name(mask));
                self.outputs.add(row_error(&out, &row.out), tolerance::sampled_row(dtype, rows, mask), location);
                self.sums.add((lse - row.lse).exp_m1().abs(), tolerance::weight_sum(dtype.into(), row), location);
                if mask == HeadType::Dense {
                    dense.clone_from(&out);
                }
                moved[mask as usize] += (tolerance::merged_row(partials.layout.splits, row) * norm(&out)).powi(2);
                distances[mask as usize] += distance(&out, &dense).powi(2);
            }
        }
        let count = (expected.rows.len() * partials.layout.head_dim as usize) as f64;
        let root_mean = |square: f64| (square / count).sqrt();
        let size = expected.dense_rms.max(f64::MIN_POSITIVE);
        let tolerances = HeadType::CANDIDATES.map(|mask| tolerance::profile_error(dtype, expected, mask));
        let of_candidates = found.errors.into_iter().zip(expected.errors).zip(tolerances);
        for (mask, ((found, reference), tolerance)) in HeadType::CANDIDATES.into_iter().zip(of_candidates) {
            let found = f64::from(found).sqrt();
            let location = || format!("batch {}, head {}, {}", index.item, index.head, name(mask));
            let error = (found - reference.sqrt()).abs() / size;
            self.errors.keep_worse(error, tolerance, location);
            let error = (found - root_mean(distances[mask as usize])).abs() / size;
            // By the triangle inequality, the distance of two rows moves by no more than both of
            // them do.
            let moved = root_mean(moved[HeadType::Dense as usize])
                + root_mean(moved[mask as usize])
                + tolerance::root_mean(count) * found;
            self.merged.keep_worse(error, moved / size, location);
        }
        self.errors.compared += 1;
        self.merged.compared += 1;
        // The reference chooses clearly when its choice is better than every other candidate.
        let chosen = expected.head_type();
        let of_candidates = || HeadType::CANDIDATES.into_iter().zip(expected.errors).zip(tolerances);
        let (_, own) = of_candidates().find(|((candidate, _), _)| *candidate == chosen)?;
        let lowest = expected.errors.into_iter().fold(f64::INFINITY, f64::min);
        let is_worse = |((candidate, error), tolerance): ((HeadType, f64), f64)| {
            candidate == chosen || (error.sqrt() - lowest.sqrt()) / size > own + tolerance
        };
        of_candidates().all(is_worse).then_some(chosen)
    }

    pub fn checks(self, case: &str) -> [Check; 4] {
        let rows = (self.heads as u64 * u64::from(self.samples) * HeadType::ALL.len() as u64, "rows");
        let heads = (self.heads as u64, "heads");
        [
            self.outputs.check("profile", case, "sampled outputs", rows),
            self.sums.check("profile", case, "sampled log-sum-exps", rows),
            self.merged.check("select", case, "errors of the samples", heads),
            self.errors.check("select", case, "mean squared errors", heads),
        ]
    }
}

/// What was compared of **judge**, over all heads.
pub struct Judged {
    pub errors: Worst,
    pub precisions: Worst,
}

impl Judged {
    /// Compares the errors of all heads with those of `out`, which is their output in 8 bits, and the
    /// precisions with the errors and the bound. `seed` drew the sampled rows.
    pub fn compare(
        spec: &Spec,
        device: &Device,
        workspace: &Buffer,
        attention: &SparseAttention,
        profiles: &[HeadProfile],
        out: &HostCopy,
        seed: u64,
    ) -> Result<Judged> {
        let layout = &spec.layout;
        let mut judged = Judged { errors: Worst::new(), precisions: Worst::new() };
        for (index, profile) in (0..).zip(profiles) {
            let partials = Partials::read(device, workspace, attention, index)?;
            let (mut difference, mut size, mut logarithms) = (0.0, 0.0, 0.0f64);
            for sample in 0..spec.profile.rows {
                let video = layout.sampled_video_row(seed, index, sample, Divisor::new(spec.profile.rows));
                let row = (layout.before + video) as usize;
                let found = out.row(profile.batch as usize, row, profile.head as usize);
                let (expected, _) = partials.merge(sample, profile.head_type);
                logarithms = logarithms.max(partials.logarithms(sample, profile.head_type));
                difference += distance(&found, &expected).powi(2);
                size += norm(&expected).powi(2);
            }
            let expected = if difference == 0.0 { 0.0 } else { (difference / size).sqrt() };
            let at = HeadIndex { item: profile.batch as usize, head: profile.head as usize };
            let Some(HeadPrecision { error, compute, .. }) = profile.precision else { continue };
            let error = f64::from(error);
            let count = f64::from(spec.profile.rows * spec.head_dim);
            let tolerance = tolerance::judged(partials.layout.splits, logarithms, count, expected);
            judged.errors.add((error - expected).abs(), tolerance, || at.name());
            let within = spec.largest_error.is_some_and(|largest| error <= f64::from(largest as f32));
            let wrong = within != (compute == Compute::E4m3);
            judged.precisions.add(wrong.into(), 0.0, || format!("{}: {} bits", at.name(), compute.bits()));
        }
        Ok(judged)
    }
}

/// The type of a head as it was found.
pub struct Choice<'a> {
    pub index: HeadIndex,
    pub profile: &'a HeadProfile,
    /// The type that the reference chooses, where it was asked. The inner `None` means that its
    /// errors are too near to each other.
    pub clear: Option<Option<HeadType>>,
}

/// Checks the types of heads. Each must be the type of the device's own lowest error, and that of
/// the reference where it has one.
///
/// Planted heads without a reference must be of the planted type, if the reference saw heads of
/// this type. It must have clearly found the type in all of them.
pub fn check_choices(choices: &[Choice], planted: bool) -> Worst {
    let plant = |index: HeadIndex| if index.head.is_multiple_of(2) { HeadType::Spatial } else { HeadType::Temporal };
    let is_plain = |kind: HeadType| {
        let mut seen = choices.iter().filter(|choice| plant(choice.index) == kind).filter_map(|choice| choice.clear);
        seen.next() == Some(Some(kind)) && seen.all(|clear| clear == Some(kind))
    };
    let plain = HeadType::CANDIDATES.into_iter().filter(|&kind| planted && is_plain(kind));
    let plain: Vec<HeadType> = plain.collect();
    let mut worst = Worst::new();
    for Choice { index, profile, clear } in choices {
        let own = least(profile.errors);
        let expected = match clear {
            Some(clear) => *clear,
            None => Some(plant(*index)).filter(|kind| plain.contains(kind)),
        };
        let wrong = profile.head_type != own || expected.is_some_and(|expected| profile.head_type != expected);
        let name = profile.head_type.name();
        worst.add(wrong.into(), 0.0, || format!("batch {}, head {}: {name}", index.item, index.head));
    }
    worst
}
