//! The options that say where a command runs its kernels, and which kernels these are.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::Args;
use framestride::device::Gpu;
use framestride::shapes::arch::Arch;
use framestride::shapes::layout::HeadType;
use framestride::shapes::spec::Spec;
use framestride::{Device, Error, Kernels, Module, Result, workspace_layout};

use crate::progress::Bar;

/// Where kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU that can run the kernels if there is one, else the emulator.
    #[default]
    Auto,
    /// The first GPU that can run the kernels, or an error.
    Gpu,
    /// The GPU of this number, or an error.
    Numbered(i32),
    /// The emulator.
    Emulator,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DeviceChoice, String> {
        Ok(match (text, text.strip_prefix("gpu:").map(str::parse::<u16>)) {
            ("auto", _) => DeviceChoice::Auto,
            ("gpu", _) => DeviceChoice::Gpu,
            ("emulator", _) => DeviceChoice::Emulator,
            (_, Some(Ok(number))) => DeviceChoice::Numbered(number.into()),
            _ => return Err("write auto, gpu, gpu:NUMBER such as gpu:1, or emulator".into()),
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Gpu => f.write_str("gpu"),
            DeviceChoice::Numbered(number) => write!(f, "gpu:{number}"),
            DeviceChoice::Emulator => f.write_str("emulator"),
        }
    }
}

/// Options of every command that runs kernels.
#[derive(Args)]
pub struct DeviceOptions {
    /// Where the kernels run: auto (the first GPU that can, else the emulator), gpu, gpu:1,
    /// emulator.
    #[arg(long, default_value_t)]
    device: DeviceChoice,
    /// The family of the kernels, such as sm_80. Without it, that is the one that suits the device
    /// best.
    #[arg(long, value_name = "NAME", conflicts_with = "ptx")]
    family: Option<Arch>,
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

    /// The chosen device. `Auto` takes the first GPU that runs the kernels. Where there is none, it
    /// takes the emulator, and gives the reason.
    pub fn choose(&self) -> Result<(Device, Option<Error>)> {
        match self.device {
            DeviceChoice::Emulator => Ok((Device::emulator(), None)),
            DeviceChoice::Gpu => Ok((first_gpu().map_err(|error| self.without_gpu(error))?, None)),
            DeviceChoice::Numbered(number) => Ok((gpu(number).map_err(|error| self.without_gpu(error))?, None)),
            DeviceChoice::Auto => {
                Ok(first_gpu().map_or_else(|error| (Device::emulator(), Some(error)), |gpu| (gpu, None)))
            }
        }
    }

    /// What to do where the GPU is not there. Other errors say it themselves.
    fn without_gpu(&self, error: Error) -> Error {
        match error {
            Error::NoGpu(_) => Error::input(
                format!("--device {}", self.device),
                error,
                "an NVIDIA GPU since Ampere, and its driver",
                "Try --device emulator; `framestride doctor` lists the GPUs",
            ),
            error => error,
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
        let Some(ptx) = &self.ptx else {
            return match self.family {
                Some(arch) => Module::load_kernels(device, &Kernels::for_spec(spec, arch)?),
                None => Module::load(device, spec),
            };
        };
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

/// GPU `number`, which runs the kernels of some family.
fn gpu(number: i32) -> Result<Device> {
    let gpu = Gpu::primary(number)?;
    gpu.arch()?;
    Ok(gpu.into())
}

/// The first GPU that runs the kernels of some family. Without one, the error is that of GPU 0.
fn first_gpu() -> Result<Device> {
    let first = gpu(0);
    match first {
        Ok(_) => first,
        Err(_) => (1..Gpu::count().unwrap_or(0)).find_map(|number| gpu(number).ok()).map_or(first, Ok),
    }
}

/// Checks whether the emulator has memory for a layer of the spec's own batch and heads.
///
/// Q, K and V lie on the host. In the emulator's memory lie the same, the output, one more copy of
/// it, and the workspace.
pub fn check_memory(spec: &Spec, device: &Device) -> Result<()> {
    let Device::Emulator(emulator) = device else { return Ok(()) };
    let tensor = spec.tensor_bytes(spec.batch, spec.heads);
    let workspace = workspace_layout(spec, device.arch()?, spec.batch, spec.heads, device.multiprocessors());
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
        "Take a machine with an NVIDIA GPU since Ampere, try a smaller spec such as demo, or insist with --device emulator",
    ))
}
