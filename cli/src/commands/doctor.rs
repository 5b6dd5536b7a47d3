//! `framestride doctor`: what this machine has and lacks.

use framestride::device::{Gpu, cuda_version};
use framestride::shapes::models;
use framestride_builder::toolchain;
use serde_json::json;

use crate::outcome::Outcome;

/// Looks for tools and a GPU.
pub fn doctor() -> Outcome {
    let tools = toolchain::Inventory::new();
    let gpu = Gpu::primary(0);
    let (gpu_text, gpu_json) = match &gpu {
        Ok(gpu) => {
            let (major, minor) = gpu.capability();
            let driver = gpu.driver_version();
            let missing = gpu.arch().err().map(|error| error.to_string());
            let fit = missing.as_ref().map_or("runs the kernels".into(), |missing| {
                format!("does not run the kernels; the emulator takes its place\n  {}", missing.replace('\n', "\n  "))
            });
            (
                format!(
                    "found   GPU        {}, compute capability {major}.{minor}, driver for CUDA {}: {fit}\n",
                    gpu.name(),
                    cuda_version(driver)
                ),
                json!({
                    "name": gpu.name(),
                    "capability": format!("{major}.{minor}"),
                    "driver": driver,
                    "runs_kernels": missing.is_none(),
                    "missing": missing,
                }),
            )
        }
        Err(error) => (
            format!("absent  GPU        {error}; the emulator takes its place\n"),
            json!({ "missing": error.to_string(), "runs_kernels": false }),
        ),
    };
    let shipped: Vec<&str> = models().iter().map(|(name, _)| *name).collect();
    // A user without a compiler must not think that kernels cannot be loaded.
    let needless = match tools.can_build() {
        true => "",
        false => "without them everything works but `framestride build` (with --template it does too)\n",
    };
    let text = format!("{tools}{needless}{gpu_text}shipped specs: {}\n", shipped.join(", "));
    let json = json!({ "can_build": tools.can_build(), "tools": tools, "gpu": gpu_json, "shipped": shipped });
    Outcome::new(text, json, true)
}
