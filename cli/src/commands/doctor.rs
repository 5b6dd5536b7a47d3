//! `framestride doctor`: what this machine has and lacks.

use framestride::Result;
use framestride::device::{Gpu, cuda_version};
use framestride::shapes::models;
use framestride_builder::toolchain;
use serde_json::{Value, json};

use crate::outcome::Outcome;

/// Looks for tools and GPUs.
pub fn doctor() -> Outcome {
    let tools = toolchain::Inventory::new();
    let numbers = match Gpu::count() {
        // The error of the first one says what is missing.
        Ok(count) => 0..count.max(1),
        Err(_) => 0..1,
    };
    let (texts, gpus): (Vec<String>, Vec<Value>) = numbers.map(|number| describe(number, Gpu::primary(number))).unzip();
    let shipped: Vec<&str> = models().iter().map(|(name, _)| *name).collect();
    // A user without a compiler must not think that kernels cannot be loaded.
    let needless = match tools.can_build() {
        true => "",
        false => "without them everything works but `framestride build` (with --template it does too)\n",
    };
    let text = format!("{tools}{needless}{}shipped specs: {}\n", texts.concat(), shipped.join(", "));
    let json = json!({ "can_build": tools.can_build(), "tools": tools, "gpus": gpus, "shipped": shipped });
    Outcome::new(text, json, true)
}

/// A line about a GPU, and the same as JSON.
fn describe(number: i32, gpu: Result<Gpu>) -> (String, Value) {
    let gpu = match gpu {
        Ok(gpu) => gpu,
        Err(error) => {
            let json = json!({ "missing": error.to_string(), "family": null });
            return (format!("absent  GPU {number}      {error}; the emulator takes its place\n"), json);
        }
    };
    let ((major, minor), driver) = (gpu.capability(), gpu.driver_version());
    let (fit, family, missing) = match gpu.arch() {
        Ok(arch) => (format!("runs the kernels of {}", arch.name), Some(arch.name), None),
        Err(error) => {
            let missing = error.to_string();
            let shown = missing.replace('\n', "\n  ");
            (format!("does not run the kernels; the emulator takes its place\n  {shown}"), None, Some(missing))
        }
    };
    let text = format!(
        "found   GPU {number}      {}, compute capability {major}.{minor}, driver for CUDA {}: {fit}\n",
        gpu.name(),
        cuda_version(driver)
    );
    let json = json!({
        "name": gpu.name(),
        "capability": format!("{major}.{minor}"),
        "driver": driver,
        "family": family,
        "missing": missing,
    });
    (text, json)
}
