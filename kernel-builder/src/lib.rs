//! From a spec to PTX and its manifest, in a `build.rs` or at run time.
//!
//! ```no_run
//! use framestride_builder::{Arch, Kernels};
//!
//! if let Err(error) = Kernels::from_spec("shapes/my_model.toml").arch(Arch::SM_90A).build() {
//!     eprintln!("{error}");
//!     std::process::exit(1);
//! }
//! ```
//!
//! As the `main` of a `build.rs` this writes `<name>.ptx` and `<name>.json` into `OUT_DIR`, and
//! tells cargo what to watch. `<name>` is the name of the spec. The crate embeds the kernels with
//! `include_str!(concat!(env!("OUT_DIR"), "/my_model.ptx"))`. Elsewhere [`Kernels::out_dir`] names
//! the folder. Without a folder nothing is written, and the result is in memory.
//!
//! These are the steps:
//!
//! 1. A device crate of a few lines is generated ([`Kernels::from_spec`]), or a user's own is taken
//!    ([`Kernels::from_crate`]).
//! 2. A nested cargo compiles it to LLVM IR with the compiler that [`toolchain::find`] finds.
//! 3. The IR is finished: [`llvm_ir`] adds launch bounds and makes assembly convergent.
//! 4. LLVM optimises it and translates it to PTX, and [`convergence`] checks the lanes of each
//!    warp.
//! 5. If ptxas is installed, its report goes into the manifest.
#![warn(missing_docs)]

use std::collections::BTreeSet;
use std::env;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

pub use framestride_shapes::arch::{ARCH_VARIABLE, Arch};
pub use framestride_shapes::manifest::Manifest;
use framestride_shapes::manifest::{Compiler, Densities, FORMAT};
use framestride_shapes::numbers::Template;
pub use framestride_shapes::spec::Spec;

mod cache;
mod cargo;
pub mod convergence;
mod core_library;
mod device_crate;
mod error;
mod files;
pub mod llvm_ir;
mod packages;
pub mod ptx;
pub mod ptxas;
pub mod toolchain;
mod translation;

pub use core_library::device_options;
use device_crate::{DeviceCrate, Generated};
pub use error::BuildError;
use error::at;
use toolchain::Toolchain;
use translation::Translation;

/// What to build.
#[derive(Clone, Debug)]
enum Source {
    /// A spec's file.
    File(PathBuf),
    /// A spec that is already read and checked.
    Parsed(Box<Spec>),
    /// Any spec whose packed rows are like this.
    Template(Template),
    /// A user's own device crate.
    Crate(PathBuf),
}

/// A step that a build has reached, for whoever shows progress.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// rustc compiles the kernels of this name. The first time it compiles `core` too.
    Compiling(String),
    /// LLVM and ptxas translate them.
    Translating(String),
    /// They are done.
    Done(String),
}

/// The function that a build tells its progress.
#[derive(Clone)]
struct Observer(Arc<dyn Fn(Progress) + Send + Sync>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// Builds kernels. It names the sources, and [`build`](Kernels::build) or
/// [`build_all`](Kernels::build_all) makes the PTX.
#[derive(Clone, Debug)]
pub struct Kernels {
    sources: Vec<Source>,
    arch: Arch,
    out_dir: Option<PathBuf>,
    cache: Option<PathBuf>,
    observer: Option<Observer>,
}

/// What a build has made.
#[derive(Clone, Debug)]
pub struct Built {
    /// Name of the kernels, which is that of the spec or of the device crate.
    pub name: String,
    /// The PTX of all kernels in one module. Its first line says what it was made for
    /// ([`Manifest::statement`]).
    pub ptx: String,
    /// What a launch must know, and what the kernels were made from.
    pub manifest: Manifest,
    /// The files of PTX and manifest; `None` if no folder was named.
    pub files: Option<Files>,
    /// The compiler's warnings about the device crate, as it prints them.
    pub warnings: Vec<String>,
    /// Every source file that the PTX depends on, without those of the compiler.
    pub inputs: Vec<PathBuf>,
}

/// The two files of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// `<name>.ptx`.
    pub ptx: PathBuf,
    /// `<name>.json`.
    pub manifest: PathBuf,
}

impl Kernels {
    /// The kernels of a spec: pack, profile, select, attention, and those in 8 bits that it asks for.
    pub fn from_spec(path: impl AsRef<Path>) -> Kernels {
        Kernels::from_specs([path])
    }

    /// The kernels of several specs, which are built in parallel. Each spec gets a PTX and a
    /// manifest.
    pub fn from_specs(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Kernels {
        Kernels::of(paths.into_iter().map(|path| Source::File(path.as_ref().to_path_buf())).collect())
    }

    /// The kernels of a spec that is already read. They are built from the text that it was read
    /// from, so a build refuses a spec whose fields were changed since.
    pub fn from_parsed(spec: &Spec) -> Kernels {
        Kernels::of(vec![Source::Parsed(Box::new(spec.clone()))])
    }

    /// The templates of kernels of a family, those of [`Template::ALL`] that it has.
    ///
    /// The numbers of a spec are literals in them that have names, and loading fills them in
    /// ([`framestride_shapes::numbers`]). The manifest of a template has no spec, and the bounds of
    /// `pack` in it are the largest.
    pub fn templates(arch: Arch) -> Kernels {
        let templates = Template::ALL.into_iter().filter(|template| template.is_of(arch));
        Kernels::of(templates.map(Source::Template).collect()).arch(arch)
    }

    /// The kernels of a device crate of your own. `path` is its folder or its Cargo.toml.
    ///
    /// The crate is `no_std` and depends on `framestride-kernels`. Its `lib.rs` has
    /// `attention_kernels!`, or entries made with `#[kernel]`, or both. Its Cargo.toml needs no
    /// profile, target or crate type.
    pub fn from_crate(path: impl AsRef<Path>) -> Kernels {
        Kernels::of(vec![Source::Crate(path.as_ref().to_path_buf())])
    }

    fn of(sources: Vec<Source>) -> Kernels {
        Kernels { sources, arch: Arch::default(), out_dir: None, cache: None, observer: None }
    }

    /// Builds for this family of GPUs. The default is [`Arch::SM_90A`].
    pub fn arch(mut self, arch: Arch) -> Kernels {
        self.arch = arch;
        self
    }

    /// Writes PTX and manifest into this folder, which is created. In a build script the default is
    /// `OUT_DIR`.
    pub fn out_dir(mut self, folder: impl Into<PathBuf>) -> Kernels {
        self.out_dir = Some(folder.into());
        self
    }

    /// Keeps builds in this folder instead of [`toolchain::cache_folder`]. If they take more than 4
    /// GiB, those that were used least lately are removed.
    pub fn cache_dir(mut self, folder: impl Into<PathBuf>) -> Kernels {
        self.cache = Some(folder.into());
        self
    }

    /// Calls `observer` with each step of a build, from one thread for each spec that is being
    /// built.
    pub fn on_progress(mut self, observer: impl Fn(Progress) + Send + Sync + 'static) -> Kernels {
        self.observer = Some(Observer(Arc::new(observer)));
        self
    }

    /// Builds one source. Of several sources it returns the first; see
    /// [`build_all`](Kernels::build_all).
    ///
    /// # Errors
    /// Any [`BuildError`]. Without a source it is [`BuildError::NoSpec`].
    pub fn build(self) -> Result<Built, BuildError> {
        self.build_all()?.into_iter().next().ok_or(BuildError::NoSpec)
    }

    /// Builds every source, in parallel, and returns the results in the order of the sources. In a
    /// build script it also tells cargo what to watch, and passes the compiler's warnings on.
    ///
    /// # Errors
    /// Any [`BuildError`], and [`BuildError::Several`] if more than one build failed. Before
    /// anything is compiled every spec is checked, and so is that no two specs have the same name.
    pub fn build_all(self) -> Result<Vec<Built>, BuildError> {
        let script = BuildScript::detect();
        let out_dir = self.out_dir.clone().or_else(|| script.as_ref().map(|script| script.out_dir.clone()));
        if let Some(script) = &script {
            script.watch_first(&self.sources);
        }
        let jobs = collect(self.sources.iter().map(|source| Job::check(source, self.arch)))?;
        self.check_names(&jobs)?;
        let toolchain = toolchain::find()?;
        let cache_folder = self.cache.clone().or_else(toolchain::cache_folder).ok_or(BuildError::NoCache)?;
        if let Some(folder) = &out_dir {
            std::fs::create_dir_all(folder).map_err(at("create", folder))?;
        }
        let results: Vec<Mutex<Option<Result<Built, BuildError>>>> = jobs.iter().map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        let workers = thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
        thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let index = next.fetch_add(1, Ordering::Relaxed)
                        && let Some(job) = jobs.get(index)
                    {
                        let built = self.build_one(job, &toolchain, &cache_folder, out_dir.as_deref());
                        if let Ok(mut place) = results[index].lock() {
                            *place = Some(built);
                        }
                    }
                });
            }
        });
        cache::prune(&cache_folder);
        let built = collect(results.into_iter().filter_map(|place| place.into_inner().ok().flatten()))?;
        if let Some(script) = &script {
            script.watch_inputs(&built);
        }
        Ok(built)
    }
}

impl Kernels {
    /// Checks that each spec has a name of its own, since its files and its folder in the cache
    /// have that name.
    fn check_names(&self, jobs: &[Job]) -> Result<(), BuildError> {
        let named = |index: usize| match &jobs[index] {
            Job::Spec(spec) => Some((&spec.name, &spec.source.file)),
            Job::Template(_) | Job::Crate(_) => None,
        };
        for (second, first) in (0..jobs.len()).flat_map(|second| (0..second).map(move |first| (second, first))) {
            if let (Some((name, first)), Some((other, second))) = (named(first), named(second))
                && name == other
            {
                return Err(BuildError::SameName { name: name.clone(), first: first.clone(), second: second.clone() });
            }
        }
        Ok(())
    }

    fn build_one(
        &self,
        job: &Job,
        toolchain: &Toolchain,
        cache: &Path,
        out_dir: Option<&Path>,
    ) -> Result<Built, BuildError> {
        let device = match job {
            Job::Crate(path) => DeviceCrate::own(path, self.arch, cache, toolchain)?,
            Job::Spec(spec) => {
                let kernels = Generated::Spec(&spec.source.text);
                DeviceCrate::generate(&spec.name, kernels, self.arch, cache, toolchain)?
            }
            Job::Template(image) => {
                let name = format!("{}_{}", self.arch.name, image.name());
                DeviceCrate::generate(&name, Generated::Template(*image), self.arch, cache, toolchain)?
            }
        };
        let name = device.name.clone();
        let tell = |stage: fn(String) -> Progress| {
            if let Some(Observer(observer)) = &self.observer {
                observer(stage(name.clone()));
            }
        };
        tell(Progress::Compiling);
        let compiled = device.compile(toolchain)?;
        tell(Progress::Translating);
        let translation = Translation::make(&device, &compiled.ir, self.arch, toolchain)?;
        tell(Progress::Done);
        // A user's own crate states its spec in `attention_kernels!`, or has none.
        let spec = match (&translation.spec, job) {
            (Some(text), Job::Spec(spec)) if *text == spec.source.text => Some((**spec).clone()),
            (Some(text), _) => Some(Spec::parse(&format!("attention_kernels! of {name}"), text)?),
            (None, _) => None,
        };
        let mut manifest = Manifest {
            format: FORMAT,
            name: name.clone(),
            arch: self.arch.name.into(),
            compiler: Compiler { rustc: toolchain.rustc_version.clone(), llvm: toolchain.llvm_version.clone() },
            ptx_sha256: String::new(),
            kernels: translation.kernels(),
            densities: spec.as_ref().map(Densities::of),
            workspace_bytes: spec.as_ref().map(|spec| spec.workspace(spec.batch, spec.heads, 1).bytes),
            spec: translation.spec.clone(),
        };
        let ptx = format!("{}\n{}", manifest.statement(), translation.ptx);
        manifest.ptx_sha256 = device_crate::sha256(&ptx);
        let files = match out_dir {
            Some(folder) => {
                let files =
                    Files { ptx: folder.join(format!("{name}.ptx")), manifest: folder.join(format!("{name}.json")) };
                files::write_atomically(&files.ptx, ptx.as_bytes())?;
                files::write_atomically(&files.manifest, manifest.to_json().as_bytes())?;
                Some(files)
            }
            None => None,
        };
        Ok(Built { name, ptx, manifest, files, warnings: compiled.warnings, inputs: compiled.inputs })
    }
}

/// A source that has passed its checks.
enum Job {
    Spec(Box<Spec>),
    Template(Template),
    Crate(PathBuf),
}

impl Job {
    fn check(source: &Source, arch: Arch) -> Result<Job, BuildError> {
        let spec = match source {
            Source::File(path) => Box::new(Spec::from_file(path)?),
            Source::Parsed(spec) => {
                spec.check_unchanged()?;
                spec.clone()
            }
            Source::Template(image) => return Ok(Job::Template(*image)),
            Source::Crate(path) => return Ok(Job::Crate(path.clone())),
        };
        if spec.template().is_of(arch) {
            return Ok(Job::Spec(spec));
        }
        let families = Arch::ALL.into_iter().filter(|arch| spec.template().is_of(*arch)).map(|arch| arch.name);
        Err(BuildError::NotOfFamily {
            compute: spec.compute.as_str(),
            families: families.collect::<Vec<_>>().join(", "),
            family: arch.name,
            name: spec.name,
        })
    }
}

/// All values, or the error. Several errors become one.
fn collect<T>(results: impl Iterator<Item = Result<T, BuildError>>) -> Result<Vec<T>, BuildError> {
    let (mut values, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) => errors.push(error),
        }
    }
    match errors.len() {
        0 => Ok(values),
        1 => Err(errors.remove(0)),
        _ => Err(BuildError::Several(errors)),
    }
}

/// The build script that this process is, if it is one.
struct BuildScript {
    out_dir: PathBuf,
}

impl BuildScript {
    fn detect() -> Option<BuildScript> {
        // `cargo run` and `cargo test` set some of these variables, but only a build script gets
        // TARGET and HOST.
        let all = ["CARGO_MANIFEST_DIR", "TARGET", "HOST"].into_iter().all(|name| env::var_os(name).is_some());
        env::var_os("OUT_DIR").filter(|_| all).map(|out_dir| BuildScript { out_dir: out_dir.into() })
    }

    /// Names what cargo must watch in any case. It comes first, so that a failed build is tried
    /// again when it is mended.
    fn watch_first(&self, sources: &[Source]) {
        for variable in toolchain::VARIABLES {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        let watch = |path: &Path| println!("cargo::rerun-if-changed={}", path.display());
        for source in sources {
            match source {
                Source::File(path) => watch(path),
                // Cargo does not watch the whole folder, because a Cargo.lock or target folder in
                // it changes by itself.
                Source::Crate(path) => {
                    let manifest = device_crate::manifest_of(path);
                    watch(&manifest.with_file_name("src"));
                    watch(&manifest);
                }
                Source::Parsed(_) | Source::Template(_) => {}
            }
        }
    }

    /// Names the sources of the kernels, the macros and the shapes, and passes the compiler's
    /// warnings on.
    fn watch_inputs(&self, built: &[Built]) {
        let inputs: BTreeSet<&Path> = built.iter().flat_map(|built| &built.inputs).map(PathBuf::as_path).collect();
        for input in inputs {
            println!("cargo::rerun-if-changed={}", input.display());
        }
        for line in built.iter().flat_map(|built| &built.warnings).flat_map(|warning| warning.lines()) {
            println!("cargo::warning={line}");
        }
    }
}
