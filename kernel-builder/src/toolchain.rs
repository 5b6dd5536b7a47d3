//! Finds the device compiler, which consists of rustc, cargo, the source of `core`, and LLVM's
//! `opt` and `llc`. It also finds NVIDIA's `ptxas` and `nvdisasm`, which are optional.
//!
//! The device compiler is looked for in this order, and the first one that has everything is used:
//!
//! 1. `FRAMESTRIDE_RUSTC`, with `FRAMESTRIDE_CARGO`, `FRAMESTRIDE_OPT` and `FRAMESTRIDE_LLC` where
//!    they do not lie beside it,
//! 2. the active `rustc`, then rustup's 1.96.0, then every other toolchain of rustup from the
//!    newest on,
//! 3. Debian's `/usr/bin/rustc`.
//!
//! It must be Rust 1.96 or later with the `rust-src` component. `opt` and `llc` must be of LLVM 22
//! or later, and not older than rustc's own LLVM, because they read the IR that rustc writes.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use framestride_shapes::text::plain;
use serde::Serialize;

use crate::error::said;

mod cuda_tools;
mod inventory;

pub(crate) use cuda_tools::cuda_version;
pub use cuda_tools::{CUDA_PACKAGES, CudaTools, setup_folder};
pub use inventory::{Finding, Inventory};

/// The oldest usable Rust. It is the first whose LLVM accepts launch bounds as function attributes.
pub const MINIMUM_RUST: (u32, u32) = (1, 96);
/// The oldest usable LLVM, for the same reason.
pub const MINIMUM_LLVM: u32 = 22;
/// How rustup provides a device compiler.
pub const RUSTUP_INSTALL: &str = "rustup toolchain install 1.96.0 --profile minimal -c rust-src -c llvm-tools";
/// How Debian provides one.
pub const DEBIAN_INSTALL: &str = "apt-get install -y --no-install-recommends rustc-web rust-web-src cargo-web llvm-22";
/// Environment variables that change what is found. A build script runs again when one of them
/// changes.
pub const VARIABLES: [&str; 8] = [
    "FRAMESTRIDE_RUSTC",
    "FRAMESTRIDE_CARGO",
    "FRAMESTRIDE_OPT",
    "FRAMESTRIDE_LLC",
    "FRAMESTRIDE_PTXAS",
    "FRAMESTRIDE_CUDA_BIN",
    "FRAMESTRIDE_CACHE",
    "FRAMESTRIDE_SOURCE",
];

/// A device compiler that has everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Toolchain {
    /// The compiler.
    pub rustc: PathBuf,
    /// Its cargo.
    pub cargo: PathBuf,
    /// LLVM's optimiser.
    pub opt: PathBuf,
    /// LLVM's code generator, with the NVPTX target.
    pub llc: PathBuf,
    /// Version of rustc with its commit: `1.96.0 (ac68faa20 2026-05-25)`.
    pub rustc_version: String,
    /// Version of `opt` and `llc`: `22.1.2`.
    pub llvm_version: String,
    /// Folder of the toolchain that holds `lib/rustlib`.
    pub sysroot: PathBuf,
    /// Where it was found, for messages: `rustup toolchain 1.96.0-x86_64-unknown-linux-gnu`.
    pub origin: String,
}

/// A compiler that was found but cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rejected {
    /// Where it was found: `active rustc`, `rustup toolchain stable-...`, `/usr/bin/rustc`.
    pub origin: String,
    /// What it lacks.
    pub reason: String,
}

/// There is no device compiler. The message says what was looked at and what to install.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no device compiler: it takes Rust {}.{} or later with rust-src, and `opt` and `llc` of LLVM {MINIMUM_LLVM} or later\n{}\ninstall one with either of\n    {RUSTUP_INSTALL}\n    {DEBIAN_INSTALL}\nor name one with FRAMESTRIDE_RUSTC (and FRAMESTRIDE_OPT, FRAMESTRIDE_LLC)",
    MINIMUM_RUST.0,
    MINIMUM_RUST.1,
    list(&self.rejected)
)]
pub struct ToolchainError {
    /// Every compiler that was found, in order.
    pub rejected: Vec<Rejected>,
}

fn list(rejected: &[Rejected]) -> String {
    if rejected.is_empty() {
        return "looked at: nothing, no rustc was found at all".into();
    }
    let lines: Vec<String> = rejected.iter().map(|r| format!("    {}: {}", r.origin, r.reason)).collect();
    format!("looked at:\n{}", said(&lines.join("\n")))
}

/// Finds the device compiler.
///
/// # Errors
/// [`ToolchainError`] if no candidate has everything. If `FRAMESTRIDE_RUSTC` is set, only that one
/// is a candidate.
pub fn find() -> Result<Toolchain, ToolchainError> {
    let mut rejected = Vec::new();
    for (origin, rustc) in candidates() {
        match examine(&rustc, &origin) {
            Ok(toolchain) => return Ok(toolchain),
            Err(reason) => rejected.push(Rejected { origin, reason }),
        }
    }
    Err(ToolchainError { rejected })
}

/// Compilers to look at, each with a name for messages. The active toolchain may come again by its
/// name. That costs a few milliseconds, and only if it could not be used the first time.
fn candidates() -> Vec<(String, PathBuf)> {
    if let Some(rustc) = named("FRAMESTRIDE_RUSTC") {
        return vec![("FRAMESTRIDE_RUSTC".into(), rustc)];
    }
    let mut found = Vec::new();
    if let Some(rustc) = on_path("rustc") {
        found.push(("active rustc".to_string(), rustc));
    }
    for name in rustup_toolchains() {
        let rustc = rustup_home().join("toolchains").join(&name).join("bin/rustc");
        if rustc.is_file() {
            found.push((format!("rustup toolchain {name}"), rustc));
        }
    }
    let debian = PathBuf::from("/usr/bin/rustc");
    if debian.is_file() && !found.iter().any(|(_, rustc)| *rustc == debian) {
        found.push(("/usr/bin/rustc".into(), debian));
    }
    found
}

fn rustup_home() -> PathBuf {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".rustup")))
        .unwrap_or_default()
}

/// Names of rustup's toolchains. 1.96.0 comes first, since the shipped kernels are made with it,
/// then other versions from the newest on, then channels.
fn rustup_toolchains() -> Vec<String> {
    let Ok(entries) = rustup_home().join("toolchains").read_dir() else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_by_key(|name| {
        let version = parse_version(name);
        (!name.starts_with("1.96.0"), std::cmp::Reverse(version), name.clone())
    });
    names
}

/// The toolchain of the compiler at `rustc`, or what it lacks.
fn examine(rustc: &Path, origin: &str) -> Result<Toolchain, String> {
    let verbose = output(rustc, &["-vV"])?;
    let field =
        |key: &str| verbose.lines().find_map(|line| line.strip_prefix(key)).map(|value| value.trim().to_string());
    let rustc_version = field("rustc ").ok_or_else(|| format!("`{} -vV` is not rustc's answer", rustc.display()))?;
    let host = field("host:").unwrap_or_default();
    if parse_version(&rustc_version).is_none_or(|(major, minor, _)| (major, minor) < MINIMUM_RUST) {
        return Err(format!("is Rust {rustc_version}, older than {}.{}", MINIMUM_RUST.0, MINIMUM_RUST.1));
    }
    let sysroot = PathBuf::from(output(rustc, &["--print", "sysroot"])?.trim());
    if !sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file() {
        return Err(format!("Rust {rustc_version} without the component rust-src"));
    }
    // rustup's `rustc` on the PATH is a proxy, and the compiler itself lies in the sysroot.
    let own = |name: &str| Some(sysroot.join("bin").join(name)).filter(|path| path.is_file());
    let rustc = own("rustc").unwrap_or_else(|| rustc.to_path_buf());
    let cargo = named("FRAMESTRIDE_CARGO")
        .or_else(|| own("cargo"))
        .or_else(|| Some(rustc.with_file_name("cargo")).filter(|path| path.is_file()))
        .ok_or_else(|| format!("Rust {rustc_version} without a cargo beside it (FRAMESTRIDE_CARGO names one)"))?;
    let cargo_version = output(&cargo, &["--version"])?;
    if parse_version(&cargo_version).is_none_or(|(major, minor, _)| (major, minor) < MINIMUM_RUST) {
        return Err(format!("its cargo is {}, older than {}.{}", cargo_version.trim(), MINIMUM_RUST.0, MINIMUM_RUST.1));
    }
    let rustc_llvm = field("LLVM version:").and_then(|version| parse_version(&version)).map_or(0, |version| version.0);
    let least = rustc_llvm.max(MINIMUM_LLVM);
    let tools = sysroot.join("lib/rustlib").join(host).join("bin");
    let (opt, llvm_version) = llvm_tool("opt", "FRAMESTRIDE_OPT", &tools, least)?;
    let (llc, llc_version) = llvm_tool("llc", "FRAMESTRIDE_LLC", &tools, least)?;
    if llvm_version != llc_version {
        return Err(format!("`{}` is LLVM {llvm_version}, but `{}` is {llc_version}", opt.display(), llc.display()));
    }
    if !output(&llc, &["--version"])?.contains("nvptx64") {
        return Err(format!("`{}` was built without the NVPTX target", llc.display()));
    }
    Ok(Toolchain { rustc, cargo, opt, llc, rustc_version, llvm_version, sysroot, origin: origin.to_string() })
}

/// Finds `opt` or `llc` of LLVM `least` or later: named by `variable`, in the toolchain, or
/// installed by a distribution.
fn llvm_tool(name: &str, variable: &str, toolchain: &Path, least: u32) -> Result<(PathBuf, String), String> {
    let mut places = Vec::new();
    if let Some(path) = named(variable) {
        places.push(path);
    } else {
        places.push(toolchain.join(name));
        for version in least..least + 4 {
            places.extend(on_path(&format!("{name}-{version}")));
            places.push(format!("/usr/lib/llvm-{version}/bin/{name}").into());
        }
        places.extend(on_path(name));
    }
    let mut seen = Vec::new();
    for path in places.iter().filter(|path| path.is_file()) {
        let text = output(path, &["--version"])?;
        let version = text.split("LLVM version ").nth(1).and_then(parse_version);
        match version {
            Some((major, minor, patch)) if major >= least => {
                return Ok((path.clone(), format!("{major}.{minor}.{patch}")));
            }
            Some((major, minor, patch)) => seen.push(format!("{} is LLVM {major}.{minor}.{patch}", path.display())),
            None => seen.push(format!("{} does not tell its LLVM version", path.display())),
        }
    }
    let seen = if seen.is_empty() { String::new() } else { format!(" ({})", seen.join(", ")) };
    Err(format!(
        "has rust-src, but there is no `{name}` of LLVM {least} or later{seen}: the component llvm-tools has it"
    ))
}

/// The first `a.b.c` of a text. A missing `c` counts as 0.
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let start = text.find(|c: char| c.is_ascii_digit())?;
    let mut numbers = text[start..].split(|c: char| !c.is_ascii_digit() && c != '.').next()?.split('.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((major, minor, numbers.next().and_then(|patch| patch.parse().ok()).unwrap_or(0)))
}

/// The path that an environment variable gives.
pub(crate) fn named(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The first executable file of this name on the PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// What a tool prints, or why it cannot be asked. Rustup must not install what a
/// `rust-toolchain.toml` asks for.
fn output(tool: &Path, arguments: &[&str]) -> Result<String, String> {
    let answer = Command::new(tool)
        .args(arguments)
        .env("RUSTUP_AUTO_INSTALL", "0")
        .output()
        .map_err(|error| format!("`{}` does not start: {error}", tool.display()))?;
    if !answer.status.success() {
        let message = String::from_utf8_lossy(&answer.stderr);
        return Err(format!("`{} {}` failed: {}", tool.display(), arguments.join(" "), plain(message.trim(), 300)));
    }
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

/// The folder in which builds are kept between runs: `FRAMESTRIDE_CACHE`, else
/// `$XDG_CACHE_HOME/framestride`, else `~/.cache/framestride`.
pub fn cache_folder() -> Option<PathBuf> {
    named("FRAMESTRIDE_CACHE")
        .or_else(|| named("XDG_CACHE_HOME").map(|folder| folder.join("framestride")))
        .or_else(|| named("HOME").map(|home| home.join(".cache/framestride")))
}

/// Removes from a command what cargo tells a build script about the crate that it builds. The
/// nested build is for another target with another compiler. Variables about the network,
/// registries and the job server stay.
///
/// The command gets the compiler by name, and first on the PATH. A build script that calls plain
/// `rustc` must not reach a proxy of rustup, which might choose, update or install a toolchain.
/// Installing is also forbidden outright.
pub(crate) fn sanitise(command: &mut Command, toolchain: &Toolchain) {
    let keep =
        ["CARGO_HOME", "CARGO_MAKEFLAGS", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_TERM_"];
    let drop = ["CARGO", "RUSTC", "RUSTFLAGS", "RUSTDOC", "RUSTUP_TOOLCHAIN", "DEP_"];
    let exact = ["OUT_DIR", "TARGET", "HOST", "NUM_JOBS", "OPT_LEVEL", "PROFILE", "DEBUG", "LD_LIBRARY_PATH"];
    let building = env::var_os("OUT_DIR").is_some() && env::var_os("CARGO_MANIFEST_DIR").is_some();
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let starts = |list: &[&str]| list.iter().any(|prefix| text.starts_with(prefix));
        if !starts(&keep) && starts(&drop) || building && exact.iter().any(|known| OsStr::new(known) == name) {
            command.env_remove(&name);
        }
    }
    command.env("RUSTC", &toolchain.rustc).env("RUSTUP_AUTO_INSTALL", "0");
    let first = toolchain.rustc.parent().map(Path::to_path_buf);
    let path = env::var_os("PATH").unwrap_or_default();
    // Joining fails only if the folder has a separator in its name. Then the PATH stays as it is.
    if let Ok(path) = env::join_paths(first.into_iter().chain(env::split_paths(&path))) {
        command.env("PATH", path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_the_answers_of_the_tools() {
        assert_eq!(parse_version("1.96.0 (ac68faa20 2026-05-25)"), Some((1, 96, 0)));
        assert_eq!(parse_version("22.1.2-rust-1.96.0-stable\n  Optimized build."), Some((22, 1, 2)));
        assert_eq!(parse_version("cargo 1.97.0-nightly (x)"), Some((1, 97, 0)));
        assert_eq!(parse_version("nightly-unknown-linux-gnu"), None);
    }

    #[test]
    fn the_error_lists_what_was_looked_at_and_both_mends() {
        let error = ToolchainError {
            rejected: vec![Rejected {
                origin: "active rustc".into(),
                reason: "is Rust 1.95.0, older than 1.96".into(),
            }],
        };
        let text = error.to_string();
        assert!(text.contains("active rustc: is Rust 1.95.0, older than 1.96"), "{text}");
        assert!(text.contains(RUSTUP_INSTALL) && text.contains(DEBIAN_INSTALL), "{text}");
    }
}
