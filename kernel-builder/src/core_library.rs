//! How code is compiled for the device, and the library `core`, compiled so once for a compiler and a family of GPUs.
//!
//! Cargo compiles `core` too (`-Z build-std=core`), but first it wants every dependency of `std`. A project with vendored crates
//! does not have them. `core` itself depends on nothing, so one call of rustc is enough:
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

/// Rust's name of the device.
pub(crate) const TARGET: &str = "nvptx64-nvidia-cuda";

/// Options for every crate of the graph, `core` too: panics that abort on the spot without a message, one module of each crate.
/// They come behind the options of a profile, and the last option counts. So neither a user's crate nor a configuration changes
/// them for some package.
///
/// LLVM must not optimise before the finishing step, because assembly is not convergent until then. rustc's own optimisation of
/// MIR is on, with the inlining that an incremental build would turn off. MIR knows of no convergence: jump threading copies a
/// call between two branches on one condition into both. It leaves inline assembly alone, and that is what an inlined callee is.
/// What gets through is refused by [`crate::convergence`].
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

/// rustc wants a crate of this name beside `core`. It holds functions for linkers, which never meet PTX, so an empty one does.
const COMPILER_BUILTINS: &str = "#![feature(compiler_builtins)]\n#![compiler_builtins]\n#![no_std]\n";

/// `core` in the cache.
pub(crate) struct CoreLibrary {
    /// The folder that holds `lib/rustlib`.
    sysroot: PathBuf,
    arch: Arch,
    /// Held until the build is done.
    _lock: File,
}

impl CoreLibrary {
    /// Compiles `core`, or takes the one already there.
    pub fn make(cache: &Path, toolchain: &Toolchain, arch: Arch) -> Result<CoreLibrary, BuildError> {
        let compiler =
            [env!("CARGO_PKG_VERSION"), &toolchain.rustc_version, &toolchain.sysroot.to_string_lossy(), arch.name]
                .map(String::from);
        let key = digest(compiler.iter().map(String::as_str).chain(OPTIONS));
        let sysroot = cache.join("builds").join(format!("core-{}", &key[..16]));
        let lock = cache::hold(&sysroot, false)?;
        create(&sysroot)?;
        // Cargo runs in another folder.
        let sysroot = sysroot.canonicalize().map_err(at("read", &sysroot))?;
        let library = CoreLibrary { sysroot, arch, _lock: lock };
        if !library.folder().is_dir() {
            // Builds side by side want it at the same time.
            let _making = cache::hold(&library.sysroot.join("making"), true)?;
            if !library.folder().is_dir() {
                library.compile(toolchain)?;
            }
        }
        Ok(library)
    }

    /// rustc's options for a crate that stands on this `core`.
    pub fn options(&self) -> Vec<String> {
        let mut options = options(self.arch);
        options.push(format!("--sysroot={}", self.sysroot.display()));
        options
    }

    fn folder(&self) -> PathBuf {
        self.sysroot.join("lib")
    }

    /// Both libraries are made in a folder beside, which is renamed when it has everything.
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
        // Only bitcode, since machine code is made of the whole graph; unstable for all but crates that ask for a feature.
        rustc.args(options(self.arch)).args([
            "-Clinker-plugin-lto",
            "-Zforce-unstable-if-unmarked",
            "--cap-lints=allow",
        ]);
        // Where `core` will lie, for the crate that needs it already.
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

/// rustc's options for crates of the device, with a `core` in the cache that is compiled for them: what clippy needs to judge one.
///
/// # Errors
/// [`BuildError::NoCache`] without a folder to keep builds in, and whatever hinders rustc.
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
