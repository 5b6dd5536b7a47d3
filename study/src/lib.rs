//! What masks and 8 bits would cost each layer and head of a model, as profiling found it in a few
//! steps that stayed dense.
//!
//! A [`Study`] has numbers alone. For each layer of a step it has, of every head,
//! * the mean square of the dense output over the rows of the video: `size`;
//! * the mean squared error of each mask at each density over the sampled rows: `errors`;
//! * where 8 bits were tried, the mean squared error of the output in 8 bits over the rows of the
//!   video, with the better mask of each density, and dense: `eight_bits`.
//!
//! Both are means over the batch items and calls of the step. The **relative error** of a head is
//! the root of its error over its size, and that of a layer the root of the sum of its heads'
//! errors over the sum of their sizes. A head has the mask with the lower error. So the relative
//! error of a layer is how far the output of its attention lies from the dense one, as part of its
//! length.
//!
//! A layer **needs** the density that takes the least time of those with which it is within an
//! error, and 8 bits where these take less. The heads then stay in 16 bits whose rounding is too
//! much: the fewest of them.
//!
//! The file is JSON: a [`Study`] as serde writes it. A number that was not finite is null, and so
//! is an error at a density that the mask cannot have, and a layer that a step did not call.
#![warn(missing_docs)]

mod picture;
mod schedule;
mod table;

use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::Compute;
use framestride::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use picture::picture;
pub use schedule::{Schedule, ScheduledStep};
pub use table::{by_head, by_layer};

/// The version of the format, which its first key has.
pub const VERSION: u64 = 1;

/// The masks that compete, in the order of profiling.
const MASKS: usize = HeadType::CANDIDATES.len();

/// How long attention in 8 bits takes, as a part of its time in 16. BENCHMARKS.md has it measured.
const EIGHT_BITS_TIME: f64 = 0.7;

/// What profiling found in some steps of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// The version of the format, 1.
    #[serde(rename = "framestride_study")]
    pub version: u64,
    /// The transformers, in the order of their layers.
    pub models: Vec<Model>,
    /// Latent frames, and height and width of a frame in patches, or 1 and the tokens of a frame.
    pub video: [u32; 3],
    /// How many rows of each head were sampled.
    pub sampled_rows: u32,
    /// The densities that were tried, from the least.
    pub densities: Vec<f64>,
    /// The relative error of a layer that is allowed, unless another one is named.
    pub error: f64,
    /// The steps, in the order of the denoising.
    pub steps: Vec<Step>,
}

/// A transformer, and how many layers of it have attention over video.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name of its class, or of a spec.
    pub name: String,
    /// Its layers.
    pub layers: usize,
}

/// A step that stayed dense.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Its number, from 0.
    pub index: u32,
    /// How many steps the denoising has.
    pub count: u32,
    /// The noise of its input, from 1 to 0, where that is known.
    pub noise: Option<f64>,
    /// The layers of all models, one behind the other.
    pub layers: Vec<Option<Layer>>,
}

/// What profiling found in a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The mean square of the dense output of each head.
    pub size: Vec<Option<f64>>,
    /// The mean squared errors, by density, head and mask: spatial, temporal.
    pub errors: Vec<Vec<[Option<f64>; MASKS]>>,
    /// The mean squared errors in 8 bits, by density and head. The last ones are those of dense
    /// attention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eight_bits: Option<Vec<Vec<Option<f64>>>>,
}

impl Study {
    /// Reads the text of a study, which messages call `subject`, and checks all of it.
    ///
    /// # Errors
    /// What was found, what is allowed, and how to mend it.
    pub fn parse(subject: &str, text: &str) -> Result<Study> {
        let refuse = |found: String, allowed: &str| {
            Error::input(subject, found, allowed, "Save it again: Study.save of Python, or framestride study --report")
        };
        let value: Value =
            serde_json::from_str(text).map_err(|error| refuse(format!("no JSON ({error})"), "a study in JSON"))?;
        match value.get("framestride_study") {
            Some(version) if *version == VERSION => {}
            Some(version) => {
                return Err(Error::input(
                    subject,
                    format!("a study of version {version}"),
                    format!("version {VERSION}"),
                    "Read it with the framestride that wrote it, or study the model again",
                ));
            }
            None => return Err(refuse("no key framestride_study".into(), "a study")),
        }
        let study: Study =
            serde_json::from_value(value).map_err(|error| refuse(error.to_string(), "the keys of a study"))?;
        study.check().map_err(|(found, allowed)| refuse(found, allowed))?;
        Ok(study)
    }

    /// What was found and what is allowed, where the numbers contradict each other.
    fn check(&self) -> std::result::Result<(), (String, &'static str)> {
        let densities = &self.densities;
        if densities.is_empty() || !densities.is_sorted_by(|a, b| a < b) {
            return Err((format!("densities {densities:?}"), "one or more, each larger than the one before"));
        }
        if let Some(density) = densities.iter().find(|&&density| !(density > 0.0 && density <= 1.0)) {
            return Err((format!("density {density}"), "densities above 0 and at most 1"));
        }
        check_error(self.error)?;
        if self.steps.is_empty() {
            return Err(("no steps".into(), "one or more"));
        }
        let layers: usize = self.models.iter().map(|model| model.layers).sum();
        for step in &self.steps {
            if step.layers.len() != layers || layers == 0 {
                let found = format!("{} layers in step {}", step.layers.len(), step.index);
                return Err((found, "as many as the models have, and one at least"));
            }
            if step.index >= step.count {
                return Err((format!("step {} of {}", step.index, step.count), "steps that count from 0"));
            }
            for (number, layer) in step.layers.iter().enumerate() {
                let Some(layer) = layer else { continue };
                let (heads, errors) = (layer.size.len(), &layer.errors);
                if heads == 0 || errors.len() != densities.len() || errors.iter().any(|errors| errors.len() != heads) {
                    let found = format!("layer {number} of step {} with numbers of another shape", step.index);
                    return Err((found, "one size a head, and two errors for each density and head"));
                }
                let in_8_bits = layer.eight_bits.as_deref().unwrap_or_default();
                let whole = layer.eight_bits.is_none() || in_8_bits.len() == densities.len() + 1;
                if !whole || in_8_bits.iter().any(|errors| errors.len() != heads) {
                    let found =
                        format!("layer {number} of step {} with numbers of another shape in 8 bits", step.index);
                    return Err((found, "one error for each density and head, and one for each head when dense"));
                }
                let of_masks = errors.iter().flatten().flatten();
                let mut squares = layer.size.iter().chain(of_masks).chain(in_8_bits.iter().flatten()).flatten();
                if let Some(square) = squares.find(|&&square| square < 0.0) {
                    return Err((format!("{square} in layer {number} of step {}", step.index), "means of squares"));
                }
            }
        }
        Ok(())
    }

    /// The same study, which allows another relative error.
    ///
    /// # Errors
    /// An error that is none.
    pub fn allowing(self, error: f64) -> Result<Study> {
        check_error(error).map_err(|(found, allowed)| {
            Error::input("error", found, allowed, "Name the relative error that a layer may have, such as 0.05")
        })?;
        Ok(Study { error, ..self })
    }

    /// The study as the text of a file, with a line for each step.
    pub fn to_json(&self) -> String {
        let steps = self.steps.iter().map(compact);
        let Study { version, models, video, sampled_rows, densities, error, .. } = self;
        lines(
            &[
                ("framestride_study", compact(version)),
                ("models", compact(models)),
                ("video", compact(video)),
                ("sampled_rows", compact(sampled_rows)),
                ("densities", compact(densities)),
                ("error", compact(error)),
            ],
            steps,
        )
    }

    /// What a layer needs to be within the allowed error, and takes the least time of all that
    /// suffices. It is dense attention in 16 bits where nothing is known to suffice.
    fn needs(&self, layer: &Layer) -> Needs {
        let heads = layer.size.len();
        let of_density = |number: usize| {
            let in_16_bits = layer.heads_in_16_bits(number, self.error)?;
            let density = self.densities.get(number).copied().unwrap_or(1.0);
            let in_8_bits = (heads - in_16_bits.len()) as f64 / heads as f64;
            let time = density * (1.0 - in_8_bits * (1.0 - EIGHT_BITS_TIME));
            Some((
                time,
                if in_8_bits > 0.0 { Needs::in_8_bits(density, in_16_bits) } else { Needs::in_16_bits(density) },
            ))
        };
        // A density counts if all larger ones suffice too, since sampled errors may fall by chance.
        let all = (0..=self.densities.len()).rev().map_while(of_density);
        all.min_by(|a, b| a.0.total_cmp(&b.0)).map_or(Needs::in_16_bits(1.0), |(_, needs)| needs)
    }

    /// Whether 8 bits were tried in some layer.
    fn has_eight_bits(&self) -> bool {
        self.steps.iter().flat_map(|step| step.layers.iter().flatten()).any(|layer| layer.eight_bits.is_some())
    }
}

/// What a layer needs to be within the allowed error.
struct Needs {
    /// Its density, 1 for dense attention.
    density: f64,
    /// What tensor cores multiply in it.
    compute: Compute,
    /// The numbers of the heads that stay in 16 bits, where the others multiply in 8.
    heads_in_16_bits: Vec<usize>,
}

impl Needs {
    fn in_16_bits(density: f64) -> Needs {
        Needs { density, compute: Compute::Dtype, heads_in_16_bits: Vec::new() }
    }

    fn in_8_bits(density: f64, heads_in_16_bits: Vec<usize>) -> Needs {
        Needs { density, compute: Compute::E4m3, heads_in_16_bits }
    }

    /// In how many bits a head multiplies.
    fn bits(&self, head: usize) -> u32 {
        if self.compute == Compute::Dtype || self.heads_in_16_bits.contains(&head) { 16 } else { 8 }
    }
}

impl Layer {
    /// The better mask of a head at a density, and its relative error, where one is known.
    fn head(&self, density: usize, head: usize) -> Option<(HeadType, f64)> {
        let errors =
            HeadType::CANDIDATES.into_iter().zip(0..).map(|(mask, at)| (mask, self.head_error(density, head, at)));
        errors.filter(|(_, error)| error.is_finite()).min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The relative error of a mask of a head.
    fn head_error(&self, density: usize, head: usize, mask: usize) -> f64 {
        ratio(self.errors[density][head][mask], self.size[head])
    }

    /// The relative error of the layer at a density.
    fn error(&self, density: usize) -> f64 {
        let errors: Option<f64> = self.errors[density].iter().map(least).sum();
        ratio(errors, self.size.iter().copied().sum())
    }

    /// The relative error of a head in 8 bits at a density, or dense behind the last one.
    fn head_error_in_8_bits(&self, density: usize, head: usize) -> f64 {
        ratio(self.eight_bits.as_ref().and_then(|errors| errors[density][head]), self.size[head])
    }

    /// The least heads that must stay in 16 bits so that the layer is within an error at a density,
    /// or dense behind the last one. `None` where it is not within it in 16 bits either.
    fn heads_in_16_bits(&self, density: usize, allowed: f64) -> Option<Vec<usize>> {
        let heads = self.size.len();
        let known = |error: Option<f64>| error.unwrap_or(f64::INFINITY);
        let in_16_bits: Vec<f64> = match self.errors.get(density) {
            Some(errors) => errors.iter().map(|masks| known(least(masks))).collect(),
            None => vec![0.0; heads],
        };
        let in_8_bits: Vec<f64> = match &self.eight_bits {
            Some(errors) => errors[density].iter().copied().map(known).collect(),
            None => vec![f64::INFINITY; heads],
        };
        // Those come first whose error 8 bits raise most.
        let mut order: Vec<usize> = (0..heads).collect();
        let rise = |&head: &usize| in_8_bits[head] - in_16_bits[head];
        order.sort_by(|a, b| rise(b).total_cmp(&rise(a)));
        let size = self.size.iter().copied().sum();
        let within = |count: usize| {
            let [first, rest] = [&order[..count], &order[count..]];
            let error =
                first.iter().map(|&head| in_16_bits[head]).chain(rest.iter().map(|&head| in_8_bits[head])).sum();
            ratio(Some(error), size) <= allowed
        };
        let count = (0..=heads).find(|&count| within(count))?;
        order.truncate(count);
        order.sort_unstable();
        Some(order)
    }

    /// The relative error of the layer in 8 bits at a density, or dense behind the last one.
    fn error_in_8_bits(&self, density: usize) -> f64 {
        let errors = self.eight_bits.as_ref().and_then(|errors| errors[density].iter().copied().sum());
        ratio(errors, self.size.iter().copied().sum())
    }
}

/// The mean squared error of the better mask of a head.
fn least(masks: &[Option<f64>; MASKS]) -> Option<f64> {
    masks.iter().flatten().copied().reduce(f64::min)
}

/// The root of a quotient of squares. It is 0 where nothing is wrong, and infinite where something
/// is not known.
fn ratio(error: Option<f64>, size: Option<f64>) -> f64 {
    match (error, size) {
        (Some(0.0), Some(_)) => 0.0,
        (Some(error), Some(size)) => (error / size).sqrt(),
        _ => f64::INFINITY,
    }
}

fn check_error(error: f64) -> std::result::Result<(), (String, &'static str)> {
    if error > 0.0 && error < 1.0 {
        return Ok(());
    }
    Err((format!("{error}"), "a part of the output's size, above 0 and below 1"))
}

/// A value on one line.
fn compact(value: &impl Serialize) -> String {
    // All values here have keys that are text, so JSON can hold them.
    serde_json::to_string(value).unwrap_or_default()
}

/// A JSON object of a few keys and of steps, one a line.
fn lines(keys: &[(&str, String)], steps: impl Iterator<Item = String>) -> String {
    let keys: String = keys.iter().map(|(key, value)| format!("  \"{key}\": {value},\n")).collect();
    let steps: Vec<String> = steps.map(|step| format!("    {step}")).collect();
    format!("{{\n{keys}  \"steps\": [\n{}\n  ]\n}}\n", steps.join(",\n"))
}
