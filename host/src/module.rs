//! Kernels of one spec, loaded on one device.

use std::path::Path;
use std::sync::Arc;

use framestride_shapes::arch::Arch;
use framestride_shapes::manifest::{Kernel as Resources, Manifest, Mismatch};
use framestride_shapes::spec::Spec;
use sha2::{Digest, Sha256};

use crate::device::{Device, Loaded};
use crate::error::{Error, Result};
use crate::launch::Kernel;

/// The kernels shipped with this crate: name, PTX, manifest.
const SHIPPED: &[(&str, &str, &str)] = include!(concat!(env!("OUT_DIR"), "/shipped.rs"));

/// PTX and manifest of one spec, not yet on a device.
#[derive(Clone, Debug)]
pub struct Kernels {
    /// The PTX text.
    pub ptx: String,
    /// Its manifest.
    pub manifest: Manifest,
}

impl Kernels {
    /// Names of the specs whose kernels are embedded in this crate.
    pub fn shipped_names() -> impl Iterator<Item = &'static str> {
        SHIPPED.iter().map(|&(name, ..)| name)
    }

    /// The embedded kernels of a shipped spec. They need no device compiler.
    pub fn shipped(name: &str) -> Result<Kernels> {
        let Some((_, ptx, manifest)) = SHIPPED.iter().find(|(shipped, ..)| *shipped == name) else {
            return Err(Error::input(
                "spec name",
                format!("{name:?}"),
                format!("one of {}", Kernels::shipped_names().collect::<Vec<_>>().join(", ")),
                "Build other specs with framestride-builder or `framestride build`",
            ));
        };
        Kernels::parse(&format!("{name}.json"), ptx, manifest)
    }

    /// The kernels of a spec: the embedded ones when they were made from an equal spec, else built now with the device compiler
    /// (20 to 40 s the first time). `file` is what messages call the text.
    pub fn for_spec(file: &str, text: &str) -> Result<Kernels> {
        let spec = Spec::parse(file, text)?;
        for &(name, ptx, manifest) in SHIPPED {
            if name == spec.name {
                let shipped = Kernels::parse(&format!("{name}.json"), ptx, manifest)?;
                if shipped.manifest.spec()? == spec {
                    return Ok(shipped);
                }
            }
        }
        let built = framestride_builder::Kernels::from_text(file, text)
            .build()
            .map_err(|error| Error::Build(error.to_string()))?;
        Kernels::new(&built.name, &built.ptx, built.manifest)
    }

    /// Reads `NAME.ptx` and the `NAME.json` beside it.
    pub fn from_file(ptx: impl AsRef<Path>) -> Result<Kernels> {
        let ptx = ptx.as_ref();
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| Error::file(path, error));
        let manifest = ptx.with_extension("json");
        Kernels::parse(&manifest.display().to_string(), &read(ptx)?, &read(&manifest)?)
    }

    /// Checks a manifest against its PTX and against this host: digest, what the PTX was made for, kernels and
    /// parameter sizes. `file` names it in errors.
    pub fn parse(file: &str, ptx: &str, manifest: &str) -> Result<Kernels> {
        Kernels::new(file, ptx, Manifest::parse(file, manifest)?)
    }

    /// [`Kernels::parse`] for a manifest that is already read.
    pub fn new(file: &str, ptx: &str, manifest: Manifest) -> Result<Kernels> {
        let kernels = Kernels { ptx: ptx.to_owned(), manifest };
        kernels.check(file)?;
        Ok(kernels)
    }

    fn check(&self, file: &str) -> Result<()> {
        let Kernels { ptx, manifest } = self;
        let again = "Build the kernels again with this version of framestride";
        let digest: String = Sha256::digest(ptx).iter().map(|byte| format!("{byte:02x}")).collect();
        if digest != manifest.ptx_sha256 {
            let allowed = format!("the manifest's {}", manifest.ptx_sha256);
            return Err(Error::input(
                format!("{file}, ptx_sha256"),
                format!("PTX with SHA-256 {digest}"),
                allowed,
                again,
            ));
        }
        if let Some(Mismatch { place, manifest, ptx }) = manifest.mismatch(ptx) {
            return Err(Error::input(
                format!("{file}, {place}"),
                manifest,
                format!("what the PTX was made for, {ptx}"),
                again,
            ));
        }
        if let Err(error) = manifest.arch.parse::<Arch>() {
            return Err(Error::input(format!("{file}, arch"), &error.found, Arch::names(), again));
        }
        for kernel in Kernel::ALL {
            let subject = format!("{file}, kernel {}", kernel.entry());
            let Some(found) = manifest.kernel(kernel.entry()) else {
                return Err(Error::input(subject, "nothing", "the four kernels of a layer", again));
            };
            if found.params_bytes as usize != kernel.params_bytes() {
                let allowed = format!("the {} that this host writes", kernel.params_bytes());
                return Err(Error::input(subject, format!("{} parameter bytes", found.params_bytes), allowed, again));
            }
        }
        Ok(())
    }
}

/// Kernels of one spec on one device.
pub struct Module {
    device: Device,
    spec: Spec,
    manifest: Manifest,
    loaded: Loaded,
    resources: [Resources; 4],
}

impl Module {
    /// Loads kernels on a device. On a GPU the driver compiles the PTX here, and never later.
    pub fn load(device: &Device, kernels: &Kernels) -> Result<Arc<Module>> {
        let manifest = kernels.manifest.clone();
        // Again, since the fields of `Kernels` are anybody's: what is launched trusts the manifest.
        kernels.check(&format!("manifest of {}", manifest.name))?;
        if let Device::Gpu(gpu) = device {
            gpu.check()?;
        }
        let spec = manifest.spec()?;
        let mut resources = Vec::with_capacity(4);
        for kernel in Kernel::ALL {
            resources.extend(manifest.kernel(kernel.entry()).cloned());
        }
        let resources: [Resources; 4] = resources.try_into().map_err(|found: Vec<Resources>| {
            Error::input(
                format!("manifest of {}", manifest.name),
                format!("{} kernels", found.len()),
                "the four kernels of a layer",
                "Make it with Kernels::parse",
            )
        })?;
        let entries = Kernel::ALL.map(|kernel| (kernel.entry(), resources[kernel as usize].shared_bytes));
        let loaded = device.load(&manifest.name, &kernels.ptx, entries)?;
        Ok(Arc::new(Module { device: device.clone(), spec, manifest, loaded, resources }))
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The spec that the kernels were made for.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    pub(crate) fn resources(&self, kernel: Kernel) -> &Resources {
        &self.resources[kernel as usize]
    }
}
