//! How code is compiled for the device, and the library `core`, which is compiled in that way once
//! for each compiler and family of GPUs.
//!
//! Cargo compiles `core` too (`-Z build-std=core`), but first it wants every dependency of `std`. A
//! project with vendored crates does not have them. `core` itself depends on nothing, so one call
//! of rustc is enough. It makes
//!
//! ```text
//! <cache>/builds/core-<key>/lib/rustlib/nvptx64-nvidia-cuda/lib/libcore.rlib
//! ```
//!
//! `core-<key>` is the sysroot of all crates that are compiled for the device.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use framestride_shapes::arch::Arch;
use toml::Table;

use crate::BuildError;
use crate::cache;
use crate::device_crate::digest;
use crate::error::{at, said};
use crate::files::create;
use crate::toolchain::{self, Toolchain};

/// Rust's name of the device, a target triple.
pub(crate) const TARGET: &str = "nvptx64-nvidia-cuda";

/// Options for every crate of the graph, `core` included. A panic aborts on the spot without a
/// message, and each crate is one LLVM module. They stand behind the options of a profile, and the
/// last option counts. So neither a user's crate nor a configuration changes them for some package.
///
/// LLVM must not optimise before the finishing step, because assembly is not convergent until then.
/// rustc's own optimisation of MIR is on, with the inlining that an incremental build would turn
/// off. MIR knows of no convergence: jump threading copies a call between two branches on one
/// condition into both. It leaves inline assembly alone, and an inlined callee is only that. What
/// gets through is refused by [`crate::convergence`].
const OPTIONS: [&str; 9] = [
    "-Zunstable-options",
    "-Cpanic=immediate-abort",
    "-Cno-prepopulate-passes",
    "-Zinline-mir=yes",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Cdebuginfo=0",
    "-Cdebug-assertions=off",
    "-Coverflow-checks=off",
];

/// The crate that rustc wants beside `core`. The real one holds functions for linkers, which never
/// meet PTX, so an empty one is enough.
const COMPILER_BUILTINS: &str = "#![feature(compiler_builtins)]\n#![compiler_builtins]\n#![no_std]\n";

/// The compiled `core` in the cache.
pub(crate) struct CoreLibrary {
    /// The folder that holds `lib/rustlib`.
    sysroot: PathBuf,
    arch: Arch,
    /// The lock that keeps it in the cache until the build is done.
    _lock: File,
}

impl CoreLibrary {
    /// Compiles `core`, or takes the one that is there.
    pub fn make(cache: &Path, toolchain: &Toolchain, arch: Arch) -> Result<CoreLibrary, BuildError> {
        let compiler = toolchain.sysroot.to_string_lossy();
        let made_by = [env!("CARGO_PKG_VERSION"), &toolchain.rustc_version, &compiler, arch.name];
        let key = digest(made_by.into_iter().chain(OPTIONS));
        let sysroot = cache.join("builds").join(format!("core-{}", &key[..16]));
        let lock = cache::hold(&sysroot, false)?;
        create(&sysroot)?;
        // A relative path would not do, because cargo runs in another folder.
        let sysroot = sysroot.canonicalize().map_err(at("read", &sysroot))?;
        let library = CoreLibrary { sysroot, arch, _lock: lock };
        if !library.folder().is_dir() {
            // Builds that run side by side reach this point together, and one of them compiles.
            let _making = cache::hold(&library.sysroot.join("making"), true)?;
            if !library.folder().is_dir() {
                library.compile(toolchain)?;
            }
        }
        Ok(library)
    }

    /// Options of rustc for a crate that is compiled against this `core`.
    pub fn options(&self) -> Vec<String> {
        let mut options = options(self.arch);
        options.push(format!("--sysroot={}", self.sysroot.display()));
        options
    }

    /// The family of GPUs that it is compiled for.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    fn folder(&self) -> PathBuf {
        self.sysroot.join("lib")
    }

    /// Compiles both libraries into a new folder, which gets its name when it has everything.
    fn compile(&self, toolchain: &Toolchain) -> Result<(), BuildError> {
        let new = self.sysroot.join("new");
        if new.exists() {
            fs::remove_dir_all(&new).map_err(at("remove", &new))?;
        }
        let out = new.join("rustlib").join(TARGET).join("lib");
        create(&out)?;
        let core = toolchain.sysroot.join("lib/rustlib/src/rust/library/core");
        self.compile_one(toolchain, "core", &core.join("src/lib.rs"), &edition(&core.join("Cargo.toml"))?, &out)?;
        let builtins = new.join("compiler_builtins.rs");
        fs::write(&builtins, COMPILER_BUILTINS).map_err(at("write", &builtins))?;
        self.compile_one(toolchain, "compiler_builtins", &builtins, "2024", &out)?;
        fs::rename(&new, self.folder()).map_err(at("create", &self.folder()))
    }

    fn compile_one(
        &self,
        toolchain: &Toolchain,
        name: &str,
        source: &Path,
        edition: &str,
        out: &Path,
    ) -> Result<(), BuildError> {
        let mut rustc = Command::new(&toolchain.rustc);
        toolchain::sanitise(&mut rustc, toolchain);
        rustc.env("RUSTC_BOOTSTRAP", "1").current_dir(out);
        rustc.args(["--crate-name", name, "--crate-type", "rlib", "--edition", edition, "--target", TARGET]);
        // Bitcode is enough, because machine code is made of the whole graph. Items without a
        // stability attribute are unstable, as everywhere in the standard library.
        rustc.args(options(self.arch)).args([
            "-Clinker-plugin-lto",
            "-Zforce-unstable-if-unmarked",
            "--cap-lints=allow",
        ]);
        // The second library finds `core` here.
        rustc.arg("-L").arg(out).arg("--sysroot").arg(&self.sysroot);
        let answer = rustc.arg("--out-dir").arg(out).arg(source).output().map_err(at("start", &toolchain.rustc))?;
        if answer.status.success() {
            return Ok(());
        }
        Err(BuildError::Tool {
            name: name.into(),
            tool: toolchain.rustc.clone(),
            input: source.into(),
            message: said(&String::from_utf8_lossy(&answer.stderr)),
        })
    }
}

/// Options of rustc for crates of the device. One of them names a `core` in the cache that was
/// compiled with the others. Clippy and rustdoc need them to look at such a crate.
///
/// # Errors
/// [`BuildError::NoCache`] when there is no folder to keep builds in, and any error of compiling
/// `core`.
pub fn device_options(toolchain: &Toolchain, arch: Arch) -> Result<Vec<String>, BuildError> {
    let cache = toolchain::cache_folder().ok_or(BuildError::NoCache)?;
    Ok(CoreLibrary::make(&cache, toolchain, arch)?.options())
}

fn options(arch: Arch) -> Vec<String> {
    let cpu = format!("-Ctarget-cpu={}", arch.name);
    OPTIONS.into_iter().map(String::from).chain([cpu]).collect()
}

/// The edition that a Cargo.toml states.
fn edition(manifest: &Path) -> Result<String, BuildError> {
    let text = fs::read_to_string(manifest).map_err(at("read", manifest))?;
    let edition =
        text.parse::<Table>().ok().and_then(|table| Some(table.get("package")?.get("edition")?.as_str()?.to_string()));
    edition.ok_or_else(|| at("read", manifest)(io::Error::other("it states no edition")))
}
