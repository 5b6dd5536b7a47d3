//! Kernels of one spec: shipped, built or read from files, and loaded on a device.

use std::path::Path;
use std::sync::Arc;

use framestride_shapes::arch::Arch;
use framestride_shapes::manifest::{KernelResources, Manifest, Mismatch};
use framestride_shapes::spec::Spec;
use sha2::{Digest, Sha256};

use crate::device::{Device, Loaded};
use crate::error::{Error, Result};
use crate::launch::Kernel;

/// The kernels of the shipped specs: name, PTX and manifest of each.
#[cfg(feature = "shipped")]
const SHIPPED: &[(&str, &str, &str)] = include!(concat!(env!("OUT_DIR"), "/shipped.rs"));

/// PTX and manifest of one spec, checked against each other, and not yet on a device.
#[derive(Clone, Debug)]
pub struct Kernels {
    ptx: String,
    manifest: Manifest,
    spec: Spec,
    /// What each kernel needs to be launched, indexed by [`Kernel`].
    resources: [KernelResources; Kernel::ALL.len()],
}

impl Kernels {
    /// Names of the specs whose kernels are embedded in this crate.
    #[cfg(feature = "shipped")]
    pub fn shipped_names() -> impl Iterator<Item = &'static str> {
        SHIPPED.iter().map(|&(name, ..)| name)
    }

    /// The embedded kernels of a shipped spec. They need no device compiler.
    ///
    /// # Errors
    /// An [`Error::Input`] that lists the names there are.
    #[cfg(feature = "shipped")]
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

    /// The kernels of a spec, built with the device compiler: 20 to 40 s the first time.
    ///
    /// With the feature `shipped`, the embedded ones are taken when they were made from an equal
    /// spec.
    ///
    /// # Errors
    /// [`Error::Build`] when the kernels cannot be built, with what is missing.
    #[cfg(feature = "build")]
    pub fn for_spec(spec: &Spec) -> Result<Kernels> {
        #[cfg(feature = "shipped")]
        if SHIPPED.iter().any(|(name, ..)| *name == spec.name) {
            let shipped = Kernels::shipped(&spec.name)?;
            if shipped.spec == *spec {
                return Ok(shipped);
            }
        }
        let built =
            framestride_builder::Kernels::from_parsed(spec).build().map_err(|error| Error::Build(error.to_string()))?;
        let kernels = Kernels::new(&built.name, &built.ptx, built.manifest)?;
        if kernels.spec != *spec {
            return Err(Error::input(
                format!("spec {}", spec.name),
                "fields that its text does not say",
                "a spec as it was read: kernels are built from the text",
                "Change the text and read it again",
            ));
        }
        Ok(kernels)
    }

    /// Reads `NAME.ptx`, and the manifest `NAME.json` beside it.
    pub fn from_file(ptx: impl AsRef<Path>) -> Result<Kernels> {
        let ptx = ptx.as_ref();
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| Error::file(path, error));
        let manifest = ptx.with_extension("json");
        Kernels::parse(&manifest.display().to_string(), &read(ptx)?, &read(&manifest)?)
    }

    /// Reads a manifest, and checks it against its PTX and against this library. `file` names it in
    /// errors.
    ///
    /// # Errors
    /// An error that says whether the digest, the spec, the kernels or their parameters do not fit.
    pub fn parse(file: &str, ptx: &str, manifest: &str) -> Result<Kernels> {
        Kernels::new(file, ptx, Manifest::parse(file, manifest)?)
    }

    /// [`Kernels::parse`] with a manifest that is already read.
    fn new(file: &str, ptx: &str, manifest: Manifest) -> Result<Kernels> {
        let resources = check(file, ptx, &manifest)?;
        let spec = manifest.spec()?;
        Ok(Kernels { ptx: ptx.to_owned(), manifest, spec, resources })
    }

    /// The PTX text.
    #[must_use]
    pub fn ptx(&self) -> &str {
        &self.ptx
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The spec that the kernels were made for.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }
}

/// Checks PTX and manifest against each other and against this library. Gives what each kernel
/// needs to be launched.
fn check(file: &str, ptx: &str, manifest: &Manifest) -> Result<[KernelResources; Kernel::ALL.len()]> {
    let again = "Build the kernels again with this version of framestride";
    let digest: String = Sha256::digest(ptx).iter().map(|byte| format!("{byte:02x}")).collect();
    if digest != manifest.ptx_sha256 {
        let allowed = format!("the manifest's {}", manifest.ptx_sha256);
        return Err(Error::input(format!("{file}, ptx_sha256"), format!("PTX with SHA-256 {digest}"), allowed, again));
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
    let resources = Kernel::ALL.map(|kernel| {
        let subject = format!("{file}, kernel {}", kernel.entry());
        let Some(found) = manifest.kernel(kernel.entry()) else {
            return Err(Error::input(subject, "nothing", "the four kernels of a layer", again));
        };
        if found.params_bytes as usize != kernel.params_bytes() {
            let allowed = format!("the {} that this host writes", kernel.params_bytes());
            return Err(Error::input(subject, format!("{} parameter bytes", found.params_bytes), allowed, again));
        }
        Ok(found.clone())
    });
    let [pack, profile, select, attention] = resources;
    Ok([pack?, profile?, select?, attention?])
}

/// The kernels of one spec on one device.
pub struct Module {
    device: Device,
    spec: Spec,
    manifest: Manifest,
    loaded: Loaded,
    resources: [KernelResources; Kernel::ALL.len()],
}

impl Module {
    /// Loads kernels on a device. On a GPU the driver compiles the PTX now, and never later.
    ///
    /// # Errors
    /// An [`Error::Input`] when the GPU or its driver does not run the kernels, [`Error::Driver`]
    /// or [`Error::Emulator`] when the PTX cannot be loaded.
    pub fn load(device: &Device, kernels: &Kernels) -> Result<Arc<Module>> {
        let Kernels { ptx, manifest, spec, resources } = kernels;
        let shared_bytes = resources.each_ref().map(|kernel| kernel.shared_bytes);
        let loaded = device.load(&manifest.name, ptx, shared_bytes)?;
        Ok(Arc::new(Module {
            device: device.clone(),
            spec: spec.clone(),
            manifest: manifest.clone(),
            loaded,
            resources: resources.clone(),
        }))
    }

    /// The device that the kernels are on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The spec that the kernels were made for.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    pub(crate) fn resources(&self, kernel: Kernel) -> &KernelResources {
        &self.resources[kernel as usize]
    }
}
