//! The options that say where a command runs its kernels, and which kernels these are.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use framestride::device::Gpu;
use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::Spec;
use framestride::{Device, Error, Kernels, Module, Result, workspace_layout};

use crate::progress::Bar;

/// Where kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A GPU that can run the kernels if there is one, else the emulator.
    #[default]
    Auto,
    /// A GPU, or an error.
    Gpu,
    /// The emulator.
    Emulator,
}

/// Options of every command that runs kernels.
#[derive(Args)]
pub struct DeviceOptions {
    /// Where the kernels run.
    #[arg(long, value_enum, default_value_t)]
    device: DeviceChoice,
    /// Kernels built before: NAME.ptx with NAME.json beside it.
    #[arg(long, value_name = "FILE")]
    ptx: Option<PathBuf>,
}

impl DeviceOptions {
    /// The files that these options make a command read.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        let manifest = self.ptx.as_ref().map(|ptx| ptx.with_extension("json"));
        self.ptx.clone().into_iter().chain(manifest)
    }

    /// The chosen device. `Auto` takes GPU 0 when it runs the kernels. Else it takes the emulator,
    /// and gives the reason.
    pub fn choose(&self) -> Result<(Device, Option<Error>)> {
        let gpu = || -> Result<Device> {
            let gpu = Gpu::primary(0)?;
            gpu.arch()?;
            Ok(gpu.into())
        };
        match self.device {
            DeviceChoice::Emulator => Ok((Device::emulator(), None)),
            DeviceChoice::Gpu => Ok((gpu().map_err(without_gpu)?, None)),
            DeviceChoice::Auto => Ok(gpu().map_or_else(|error| (Device::emulator(), Some(error)), |gpu| (gpu, None))),
        }
    }

    /// The device for a whole layer of a spec. Where `auto` does not take the GPU, the reason goes
    /// to standard error.
    pub fn choose_for(&self, spec: &Spec) -> Result<Device> {
        let (device, passed_over) = self.choose()?;
        if let Some(reason) = passed_over {
            check_emulation(spec, &reason)?;
            eprintln!("note: on the emulator. {reason}");
        }
        Ok(device)
    }

    /// The kernels of a spec on a device.
    pub fn load(&self, spec: &Spec, device: &Device, bar: &Bar) -> Result<Arc<Module>> {
        bar.say("loading kernels", None);
        let Some(ptx) = &self.ptx else { return Module::load(device, spec) };
        let kernels = Kernels::from_file(ptx)?;
        if kernels.spec() != spec {
            return Err(Error::input(
                ptx.display(),
                format!("kernels of another spec, named {}", kernels.manifest().name),
                format!("kernels of {}", spec.source.file),
                "Build them again from this spec",
            ));
        }
        Module::load_kernels(device, &kernels)
    }
}

/// What to do where `--device gpu` finds none. Other errors say it themselves.
fn without_gpu(error: Error) -> Error {
    match error {
        Error::NoGpu(_) => Error::input(
            "--device gpu",
            error,
            "a machine with a Hopper GPU and its driver",
            "Try --device emulator; `framestride doctor` shows what was found",
        ),
        error => error,
    }
}

/// Checks whether the emulator has memory for a layer of the spec's own batch and heads.
///
/// Q, K and V lie on the host. In the emulator's memory lie the same, the output, one more copy of
/// it, and the workspace.
pub fn check_memory(spec: &Spec, device: &Device) -> Result<()> {
    let Device::Emulator(emulator) = device else { return Ok(()) };
    let tensor = spec.tensor_bytes(spec.batch, spec.heads);
    let workspace = workspace_layout(spec, spec.batch, spec.heads, device.multiprocessors());
    emulator.check_room(8 * tensor + workspace.bytes)
}

/// Operations a second of the attention kernel in the emulator, on one core, rounded.
const EMULATED_FLOPS: f64 = 4e9;

/// Refuses a layer that takes more than 10 minutes. Who asks for the emulator by name may wait
/// longer.
fn check_emulation(spec: &Spec, no_gpu: &Error) -> Result<()> {
    let flops = spec.flops(HeadType::Dense) as f64 * f64::from(spec.heads) * f64::from(spec.batch);
    // The rate was measured on two cores. How far it scales is not known, so no more than 16 count.
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(16)) as f64;
    let minutes = flops / EMULATED_FLOPS / cores / 60.0;
    if minutes < 10.0 {
        return Ok(());
    }
    Err(Error::input(
        format!("spec {}", spec.name),
        format!(
            "{:.1} TFLOP a dense layer, some {minutes:.0} minutes in the emulator, and no GPU that runs it ({no_gpu})",
            flops / 1e12
        ),
        "what the emulator does in 10 minutes",
        "Take a machine with a Hopper GPU, try a smaller spec such as demo, or insist with --device emulator",
    ))
}
