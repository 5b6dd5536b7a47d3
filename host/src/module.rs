//! Kernels of one spec: filled in from a template or read from files, and loaded on a device.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use framestride_shapes::arch::{Arch, UnknownArch};
use framestride_shapes::manifest::{KernelResources, Manifest, Mismatch};
use framestride_shapes::spec::Spec;
use sha2::{Digest, Sha256};

use crate::device::{Device, Loaded};
use crate::error::{Error, Result};
use crate::launch::Kernel;

/// PTX and manifest of one spec, checked against each other, and not yet on a device.
#[derive(Clone, Debug)]
pub struct Kernels {
    ptx: String,
    manifest: Manifest,
    spec: Spec,
    arch: Arch,
    /// What each kernel needs to be launched.
    resources: Resources,
}

impl Kernels {
    /// The kernels of any spec for a family of GPUs: a template of this library with the numbers of
    /// the spec. It takes milliseconds, and needs no compiler.
    ///
    /// # Errors
    /// An [`Error::Spec`] when the fields of the spec were changed after it was read.
    #[cfg(feature = "templates")]
    pub fn for_spec(spec: &Spec, arch: Arch) -> Result<Kernels> {
        // What follows counts on a spec that was checked, as its text is when it is read.
        spec.check_unchanged()?;
        let (ptx, manifest) = crate::template::fill(spec, arch)?;
        let (_, resources) = resources(&manifest.name, &manifest, spec)?;
        Ok(Kernels { ptx, manifest, spec: spec.clone(), arch, resources })
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
        let manifest = Manifest::parse(file, manifest)?;
        check(file, ptx, &manifest)?;
        if manifest.spec.is_none() {
            let (found, allowed) = ("none: these kernels are a template", "kernels with the numbers of a spec");
            let mend = "Write them with `framestride build SPEC --template`";
            return Err(Error::input(format!("{file}, spec"), found, allowed, mend));
        }
        let spec = manifest.spec()?;
        let (arch, resources) = resources(file, &manifest, &spec)?;
        Ok(Kernels { ptx: ptx.to_owned(), manifest, spec, arch, resources })
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

    /// The family of GPUs that the kernels were made for.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.arch
    }
}

/// SHA-256 of a text in lower-case hexadecimal.
pub(crate) fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How kernels of another version are mended.
const AGAIN: &str = "Build the kernels again with this version of framestride";

/// Checks PTX and manifest against each other.
fn check(file: &str, ptx: &str, manifest: &Manifest) -> Result<()> {
    let digest = sha256(ptx);
    if digest != manifest.ptx_sha256 {
        let allowed = format!("the manifest's {}", manifest.ptx_sha256);
        return Err(Error::input(format!("{file}, ptx_sha256"), format!("PTX with SHA-256 {digest}"), allowed, AGAIN));
    }
    if let Some(Mismatch { place, manifest, ptx }) = manifest.mismatch(ptx) {
        return Err(Error::input(
            format!("{file}, {place}"),
            manifest,
            format!("what the PTX was made for, {ptx}"),
            AGAIN,
        ));
    }
    Ok(())
}

/// What each kernel needs to be launched, indexed by [`Kernel`]. There is none for a kernel that the
/// module does not have.
type Resources = [Option<KernelResources>; Kernel::ALL.len()];

/// The family that kernels were made for, and what each needs to be launched. Checks that this
/// library can launch it.
fn resources(file: &str, manifest: &Manifest, spec: &Spec) -> Result<(Arch, Resources)> {
    let arch = manifest
        .arch
        .parse()
        .map_err(|error: UnknownArch| Error::input(format!("{file}, arch"), &error.found, Arch::names(), AGAIN))?;
    let mut resources = Resources::default();
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_of(spec)) {
        let subject = format!("{file}, kernel {}", kernel.entry());
        let Some(found) = manifest.kernel(kernel.entry()) else {
            return Err(Error::input(subject, "nothing", "all kernels of a layer", AGAIN));
        };
        if found.params_bytes as usize != kernel.params_bytes() {
            let allowed = format!("the {} that this host writes", kernel.params_bytes());
            return Err(Error::input(subject, format!("{} parameter bytes", found.params_bytes), allowed, AGAIN));
        }
        resources[kernel as usize] = Some(found.clone());
    }
    Ok((arch, resources))
}

/// The kernels of one spec on one device.
pub struct Module {
    device: Device,
    spec: Spec,
    arch: Arch,
    manifest: Manifest,
    loaded: Loaded,
    loading: Loading,
    resources: Resources,
}

/// How long a module took to load.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Loading {
    /// Seconds that it took to fill in the template. It is 0 for kernels that were there before.
    pub fill: f64,
    /// Seconds that the device took to load the kernels.
    pub load: f64,
    /// Seconds of these that the driver's compiler took. It is 0 when the driver found the kernels
    /// in its cache, and on the emulator.
    pub compile: f64,
}

impl Loading {
    /// Whether the driver compiled the kernels now, and did not find them in its cache.
    #[must_use]
    pub fn is_compiled(&self) -> bool {
        self.compile > 0.0
    }
}

impl Module {
    /// Loads the kernels of any spec on a device ([`Kernels::for_spec`]), of the family that suits
    /// it best ([`Device::arch`]). It needs the feature `templates`.
    ///
    /// # Errors
    /// As [`Module::load_kernels`] and [`Kernels::for_spec`].
    #[cfg(feature = "templates")]
    pub fn load(device: &Device, spec: &Spec) -> Result<Arc<Module>> {
        let start = Instant::now();
        let kernels = Kernels::for_spec(spec, device.arch()?)?;
        let fill = start.elapsed().as_secs_f64();
        let mut module = Module::on_device(device, &kernels)?;
        module.loading.fill = fill;
        Ok(Arc::new(module))
    }

    /// Loads kernels on a device. On a GPU the driver compiles the PTX now, and never later.
    ///
    /// # Errors
    /// An [`Error::Input`] when the GPU or its driver does not run the kernels, [`Error::Driver`]
    /// or [`Error::Emulator`] when the PTX cannot be loaded.
    pub fn load_kernels(device: &Device, kernels: &Kernels) -> Result<Arc<Module>> {
        Module::on_device(device, kernels).map(Arc::new)
    }

    fn on_device(device: &Device, kernels: &Kernels) -> Result<Module> {
        let Kernels { ptx, manifest, spec, arch, resources } = kernels;
        let shared_bytes = resources.each_ref().map(|kernel| kernel.as_ref().map(|kernel| kernel.shared_bytes));
        let start = Instant::now();
        let loaded = device.load(*arch, &manifest.name, ptx, shared_bytes)?;
        let compile = f64::from(loaded.compile_ms()) / 1e3;
        let loading = Loading { fill: 0.0, load: start.elapsed().as_secs_f64(), compile };
        Ok(Module {
            device: device.clone(),
            spec: spec.clone(),
            arch: *arch,
            manifest: manifest.clone(),
            loaded,
            loading,
            resources: resources.clone(),
        })
    }

    /// How long it took to load.
    #[must_use]
    pub fn loading(&self) -> Loading {
        self.loading
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

    /// The family of GPUs that the kernels were made for.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// What a kernel of the module needs to be launched.
    pub(crate) fn resources(&self, kernel: Kernel) -> &KernelResources {
        self.resources[kernel as usize].as_ref().expect("a call plans kernels of its module alone")
    }
}
