//! The crate that is compiled for the device, and the nested cargo that compiles it to LLVM IR.
//!
//! For a spec, a crate of a few lines is generated in the cache. A user's own crate is taken as it
//! is. Builds are kept between runs, so that the procedural macros are compiled once:
//!
//! ```text
//! <cache>/builds/<key>/target/              cargo's target directory, for all generated crates
//! <cache>/builds/<key>/source/              workspace of the kernels, the macros and the shapes
//! <cache>/builds/<key>/crates/<name>/       generated crate, with a link to source/
//! <cache>/builds/<key>/crates/<name>.work/  IR, PTX and what they were made from
//! ```
//!
//! The key is a digest of the compiler's versions, the family of GPUs, and the identity of the
//! sources. A generated crate reaches the sources through a symbolic link named `source`. So their
//! path relative to the crate is the same on every machine. Cargo derives the hashes in symbol
//! names from that path, and the PTX must not depend on the place of a checkout.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use framestride_shapes::arch::{ARCH_VARIABLE, Arch};
use framestride_shapes::image::Image;
use framestride_shapes::numbers::Template;
use sha2::{Digest, Sha256};

use crate::BuildError;
use crate::cache::{self, CRATES};
use crate::cargo;
use crate::core_library::{CoreLibrary, TARGET};
use crate::error::{at, said};
use crate::files::{create, link, write_atomically, write_if_new};
use crate::packages::Packages;
use crate::toolchain::Toolchain;

/// A crate to compile, and its place in the cache.
pub(crate) struct DeviceCrate {
    /// Name of the kernels, for people.
    pub name: String,
    /// Its Cargo.toml.
    pub manifest: PathBuf,
    /// Folder of the key, which is shared by all crates of one compiler and one set of sources.
    folder: PathBuf,
    /// Folder of this crate's IR and PTX.
    pub work: PathBuf,
    /// Whether the builder wrote this crate. Else its user did.
    generated: bool,
    core: CoreLibrary,
    /// Locks of the key and of the crate, held until the build is done.
    _locks: [File; 2],
}

/// What a crate is generated for.
pub(crate) enum Generated<'a> {
    /// The text of a spec.
    Spec(&'a str),
    /// Every spec whose packed rows are like this.
    Template(Template),
}

/// What the compiler has made of a crate.
pub(crate) struct Compiled {
    /// LLVM IR of the whole crate graph, not optimised.
    pub ir: PathBuf,
    /// Source files that it was made from, without generated ones.
    pub inputs: Vec<PathBuf>,
    /// The compiler's warnings, rendered.
    pub warnings: Vec<String>,
}

impl DeviceCrate {
    /// Generates a crate with the kernels of a spec or of a template, or takes the one that is
    /// there if nothing differs. Waits while another build uses it.
    pub fn generate(
        name: &str,
        kernels: Generated,
        arch: Arch,
        cache: &Path,
        toolchain: &Toolchain,
    ) -> Result<DeviceCrate, BuildError> {
        let packages = Packages::find()?;
        let (folder, key_lock) = build_folder(cache, toolchain, arch, &packages.identity()?)?;
        let core = CoreLibrary::make(cache, toolchain, arch)?;
        let source = folder.join("source");
        packages.make_workspace(&source)?;
        let (root, work, lock) = crate_folders(&folder, name)?;
        create(&root.join("src"))?;
        link(&source, &root.join("source"))?;
        let manifest = root.join("Cargo.toml");
        write_if_new(&manifest, GENERATED_MANIFEST.replace("NAME", name).as_bytes())?;
        let (input, made_for) = match kernels {
            Generated::Spec(text) => {
                let file = root.join("spec.toml");
                write_if_new(&file, text.as_bytes())?;
                (format!("spec = \"{}\"", file.display().to_string().escape_default()), digest([text]))
            }
            Generated::Template(Template { image: Image { head_dim, dtype }, compute }) => {
                let (dtype, compute) = (dtype.as_str(), compute.as_str());
                (format!("template = {{ head_dim = {head_dim}, dtype = {dtype}, compute = {compute} }}"), "any".into())
            }
        };
        let library = GENERATED_LIBRARY.replace("INPUT", &input).replace("SPEC", &made_for);
        write_if_new(&root.join("src/lib.rs"), library.as_bytes())?;
        let own_lock = root.join("Cargo.lock");
        // A full disk may have cut off the file that cargo itself wrote.
        let whole = fs::read_to_string(&own_lock).is_ok_and(|text| text.parse::<toml::Table>().is_ok());
        if let Some(tested) = packages.tested_versions().filter(|_| !whole) {
            // These are the versions that the checkout was tested with. Cargo drops those that the
            // crate does not need.
            write_atomically(&own_lock, &fs::read(&tested).map_err(at("read", &tested))?)?;
        }
        Ok(DeviceCrate { name: name.into(), manifest, folder, work, generated: true, core, _locks: [key_lock, lock] })
    }

    /// Takes a user's own crate. `path` is its folder or its Cargo.toml.
    pub fn own(path: &Path, arch: Arch, cache: &Path, toolchain: &Toolchain) -> Result<DeviceCrate, BuildError> {
        let manifest = manifest_of(path);
        let manifest = manifest.canonicalize().map_err(at("read", &manifest))?;
        let root = manifest.parent().unwrap_or(Path::new("/")).to_path_buf();
        // A crate that uses none of framestride's packages needs none to be there.
        let packages = Packages::find().and_then(|packages| packages.identity()).unwrap_or_default();
        let source = format!("{}\n{packages}", root.display());
        let (folder, key_lock) = build_folder(cache, toolchain, arch, &source)?;
        let core = CoreLibrary::make(cache, toolchain, arch)?;
        let name = package_name(&manifest, toolchain, &folder)?;
        let (_, work, lock) = crate_folders(&folder, &name)?;
        Ok(DeviceCrate { name, manifest, folder, work, generated: false, core, _locks: [key_lock, lock] })
    }

    /// Compiles the crate to LLVM IR, or takes the IR that is there if no source has changed.
    pub fn compile(&self, toolchain: &Toolchain) -> Result<Compiled, BuildError> {
        let ir = self.work.join("device.ll");
        let mut answer = self.run_cargo(toolchain, &ir)?;
        let versions = self.manifest.with_file_name("Cargo.lock");
        if self.generated && answer.is_failure_of_cargo() && versions.is_file() {
            // An earlier build may have locked versions that a vendored source no longer has.
            fs::remove_file(&versions).map_err(at("remove", &versions))?;
            answer = self.run_cargo(toolchain, &ir)?;
        }
        if answer.success && !ir.is_file() {
            // Cargo takes its outputs for fresh even when the IR was deleted.
            let library = self.manifest.with_file_name("src").join("lib.rs");
            let touched = File::options().append(true).open(&library);
            touched.and_then(|file| file.set_modified(SystemTime::now())).map_err(at("touch", &library))?;
            answer = self.run_cargo(toolchain, &ir)?;
        }
        if !answer.success {
            return Err(self.does_not_compile(&answer));
        }
        let inputs = self.inputs(&answer.messages.library, toolchain)?;
        Ok(Compiled { ir, inputs, warnings: answer.messages.warnings })
    }

    fn run_cargo(&self, toolchain: &Toolchain, ir: &Path) -> Result<Answer, BuildError> {
        let target = self.folder.join("target");
        let mut cargo = cargo::command(toolchain, &self.folder, &self.work)?;
        cargo.args(["rustc", "--release", "--lib", "--crate-type", "cdylib", "--message-format", "json"]);
        cargo.arg("--manifest-path").arg(&self.manifest).arg("--target-dir").arg(&target);
        cargo.args(["--target", TARGET, "--"]);
        cargo.arg(format!("--emit=llvm-ir={}", ir.display())).args(["-C", "linker=/bin/true"]);
        // `RUSTC_BOOTSTRAP` permits unstable options, and empty wrappers override those of the
        // user. There is no `--config` here: behind the subcommand it would make cargo forget the
        // one before it, which says where crates come from.
        cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_PROFILE_RELEASE_LTO", "fat").env("CARGO_INCREMENTAL", "0");
        cargo.env(ARCH_VARIABLE, self.core.arch().name);
        cargo.env("RUSTC_WRAPPER", "").env("RUSTC_WORKSPACE_WRAPPER", "");
        cargo.env("CARGO_ENCODED_RUSTFLAGS", self.core.options().join("\x1f")).env("CARGO_BUILD_BUILD_DIR", &target);
        let answer = cargo.output().map_err(at("start", &toolchain.cargo))?;
        Ok(Answer {
            success: answer.status.success(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            messages: Messages::read(&answer.stdout, &self.manifest),
        })
    }

    fn does_not_compile(&self, answer: &Answer) -> BuildError {
        let errors = &answer.messages.errors;
        let builds = self.folder.parent().unwrap_or(&self.folder);
        // rustc names a damaged library with its path, or says which format it misses.
        let builds_text = builds.to_string_lossy();
        let names_a_library = |error: &String| error.contains(&*builds_text) || error.contains("in rlib format");
        let doubtful = answer.is_failure_of_cargo() || errors.iter().any(names_a_library);
        BuildError::Compile {
            name: self.name.clone(),
            manifest: self.manifest.clone(),
            message: said(&if errors.is_empty() { answer.stderr.clone() } else { errors.concat() }),
            kept: doubtful.then(|| builds.to_path_buf()),
        }
    }

    /// The sources that cargo lists for the library, each with its Cargo.toml. Those of the
    /// compiler and of the generated crate are left out.
    fn inputs(&self, library: &str, toolchain: &Toolchain) -> Result<Vec<PathBuf>, BuildError> {
        let list = self.folder.join("target").join(TARGET).join("release").join(format!("{library}.d"));
        let listed = fs::read_to_string(&list).map_err(at("read", &list))?;
        let names = listed.split_once(": ").map_or("", |(_, names)| names).replace("\\ ", "\0");
        let paths = names.split_whitespace().map(|name| PathBuf::from(name.replace('\0', " ")));
        let sources = paths
            .filter_map(|path| path.canonicalize().ok())
            .filter(|path| !path.starts_with(&toolchain.sysroot) && !path.starts_with(&self.folder));
        let mut inputs = BTreeSet::new();
        for source in sources {
            inputs.extend(source.ancestors().map(|folder| folder.join("Cargo.toml")).find(|path| path.is_file()));
            inputs.insert(source);
        }
        Ok(inputs.into_iter().collect())
    }
}

/// What separates folders in a list. Cargo writes such a list for the loader of procedural macros.
pub(crate) const PATH_SEPARATOR: char = if cfg!(windows) { ';' } else { ':' };

const GENERATED_MANIFEST: &str = r#"# Generated by framestride-builder.
[package]
name = "framestride-device-NAME"
version = "0.0.0"
edition = "2024"
publish = false

[lib]
path = "src/lib.rs"

[dependencies]
framestride-kernels = { path = "source/gpu-kernels" }

# Its own workspace, as framestride's is beyond the link.
[workspace]
exclude = ["source"]
"#;

const GENERATED_LIBRARY: &str = r#"// Generated by framestride-builder. Spec: SPEC
#![no_std]
#![feature(abi_ptx, asm_experimental_arch)]
framestride_kernels::attention_kernels!(INPUT);
"#;

/// How a run of cargo ended.
struct Answer {
    success: bool,
    stderr: String,
    messages: Messages,
}

impl Answer {
    /// Whether cargo failed before rustc reported any error.
    fn is_failure_of_cargo(&self) -> bool {
        !self.success && self.messages.errors.is_empty()
    }
}

/// What cargo reports as lines of JSON.
#[derive(Default)]
struct Messages {
    errors: Vec<String>,
    warnings: Vec<String>,
    /// Name of the library that the Cargo.toml makes.
    library: String,
}

impl Messages {
    fn read(stdout: &[u8], manifest: &Path) -> Messages {
        let mut messages = Messages::default();
        for line in String::from_utf8_lossy(stdout).lines() {
            let Ok(value) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            if value["reason"] == "compiler-artifact"
                && value["manifest_path"].as_str().map(Path::new) == Some(manifest)
                && let Some(name) = value["target"]["name"].as_str()
            {
                messages.library = name.into();
            }
            let Some(rendered) = value["message"]["rendered"].as_str() else { continue };
            match value["message"]["level"].as_str() {
                Some("error" | "error: internal compiler error") => messages.errors.push(rendered.into()),
                Some("warning") => messages.warnings.push(rendered.into()),
                _ => {}
            }
        }
        messages
    }
}

/// The Cargo.toml of a crate. `path` is the crate's folder or the file itself.
pub(crate) fn manifest_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("Cargo.toml") } else { path.to_path_buf() }
}

/// Name of the package of a Cargo.toml. Cargo is asked, because it knows all ways to write a name.
fn package_name(manifest: &Path, toolchain: &Toolchain, folder: &Path) -> Result<String, BuildError> {
    let mut cargo = cargo::command(toolchain, folder, folder)?;
    cargo.args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"]).arg(manifest);
    let answer = cargo.output().map_err(at("start", &toolchain.cargo))?;
    let wrong = |problem: String| BuildError::Crate { path: manifest.to_path_buf(), problem };
    if !answer.status.success() {
        return Err(wrong(format!("cargo cannot read it:\n{}", said(&String::from_utf8_lossy(&answer.stderr)))));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&answer.stdout).map_err(|error| wrong(format!("cargo's metadata: {error}")))?;
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    packages
        .iter()
        .find(|package| package["manifest_path"].as_str().map(Path::new) == Some(manifest))
        .and_then(|package| package["name"].as_str())
        .map(String::from)
        .ok_or_else(|| wrong("is no package: name the folder of the device crate itself".into()))
}

/// The folder of a key, which is created, and its lock.
fn build_folder(cache: &Path, toolchain: &Toolchain, arch: Arch, source: &str) -> Result<(PathBuf, File), BuildError> {
    let key = digest([
        env!("CARGO_PKG_VERSION"),
        &toolchain.rustc_version,
        &toolchain.sysroot.to_string_lossy(),
        arch.name,
        source,
    ]);
    let folder = cache.join("builds").join(&key[..16]);
    let lock = cache::hold(&folder, false)?;
    create(&folder)?;
    // Cargo reports canonical paths, and they are compared with this one.
    let folder = folder.canonicalize().map_err(at("read", &folder))?;
    if folder.to_string_lossy().contains([',', PATH_SEPARATOR]) {
        return Err(BuildError::CacheName { folder });
    }
    Ok((folder, lock))
}

/// The folder of a generated crate, the folder of its IR and PTX, which is created, and the lock of
/// both.
fn crate_folders(folder: &Path, name: &str) -> Result<(PathBuf, PathBuf, File), BuildError> {
    let root = folder.join(CRATES).join(name);
    let lock = cache::hold(&root, true)?;
    let work = root.with_extension("work");
    create(&work)?;
    Ok((root, work, lock))
}

/// SHA-256 of texts in lower-case hexadecimal. A zero byte ends each text.
pub(crate) fn digest<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update(text);
        hash.update([0]);
    }
    hex(&hash.finalize())
}

/// SHA-256 of a text in lower-case hexadecimal.
pub(crate) fn sha256(text: &str) -> String {
    hex(&Sha256::digest(text))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
