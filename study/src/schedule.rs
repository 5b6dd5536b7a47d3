//! The schedule that a study writes: a density for each layer and step.
//!
//! The file is JSON, which `framestride.diffusers.apply` of Python takes:
//!
//! ```json
//! {
//!   "framestride_schedule": 1,
//!   "models": [{"name":"WanTransformer3DModel","layers":3}],
//!   "error": 0.05,
//!   "steps": [
//!     {"index":0,"count":8,"noise":1.0,"density":[1.0,0.5,0.35]},
//!     {"index":4,"count":8,"noise":0.83,"density":[0.5,0.25,null]}
//!   ]
//! }
//! ```
//!
//! Density 1 is dense attention, and null a layer that the step did not call. Where 8 bits were
//! tried, each step has also `compute`, which names `"e4m3"` or `"dtype"` for each layer. Where
//! some heads of a layer in 8 bits would exceed the error, `heads_in_16_bits` lists their numbers,
//! for each layer of the step:
//!
//! ```json
//! {"index":4,"count":8,"noise":0.83,"density":[0.5,0.25,null],
//!  "compute":["e4m3","e4m3",null],"heads_in_16_bits":[[3,11],[],null]}
//! ```

use serde::Serialize;

use crate::{Model, Needs, Study, VERSION, compact, lines};

/// Densities by step and layer, with which each layer is within an error.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Schedule {
    /// The transformers, in the order of their layers.
    pub models: Vec<Model>,
    /// The relative error that each layer is within.
    pub error: f64,
    /// The steps that were studied, in the order of the denoising.
    pub steps: Vec<ScheduledStep>,
}

/// The densities of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ScheduledStep {
    /// Its number, from 0.
    pub index: u32,
    /// How many steps the denoising had.
    pub count: u32,
    /// The noise of its input, where that is known.
    pub noise: Option<f64>,
    /// The density of each layer, 1 for dense attention, or `None` where the step did not call it.
    pub density: Vec<Option<f64>>,
    /// What tensor cores multiply in each layer, as a spec says it. Without it, that is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compute: Option<Vec<Option<&'static str>>>,
    /// The numbers of the heads that stay in 16 bits where a layer is in 8, from 0. Without it,
    /// there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads_in_16_bits: Option<Vec<Option<Vec<usize>>>>,
}

impl Study {
    /// The least densities that were tried with which each layer is within the study's error. Where
    /// that takes less time, they are those in 8 bits, but for the fewest heads that must stay in
    /// 16.
    pub fn schedule(&self) -> Schedule {
        let has_eight_bits = self.has_eight_bits();
        let steps = self.steps.iter().map(|step| {
            let needs: Vec<Option<Needs>> =
                step.layers.iter().map(|layer| layer.as_ref().map(|layer| self.needs(layer))).collect();
            let density = needs.iter().map(|needs| needs.as_ref().map(|needs| needs.density)).collect();
            let compute = needs.iter().map(|needs| needs.as_ref().map(|needs| needs.compute.as_str())).collect();
            let is_mixed = needs.iter().flatten().any(|needs| !needs.heads_in_16_bits.is_empty());
            let heads = needs.into_iter().map(|needs| needs.map(|needs| needs.heads_in_16_bits)).collect();
            ScheduledStep {
                index: step.index,
                count: step.count,
                noise: step.noise,
                density,
                compute: has_eight_bits.then_some(compute),
                heads_in_16_bits: is_mixed.then_some(heads),
            }
        });
        Schedule { models: self.models.clone(), error: self.error, steps: steps.collect() }
    }
}

impl Schedule {
    /// The schedule as the text of a file, with a line for each step.
    pub fn to_json(&self) -> String {
        let keys = [
            ("framestride_schedule", compact(&VERSION)),
            ("models", compact(&self.models)),
            ("error", compact(&self.error)),
        ];
        lines(&keys, self.steps.iter().map(compact))
    }
}
