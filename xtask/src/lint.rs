//! What a change must pass beside the tests: format, lints, documentation, and the promised minimum
//! Rust.
//!
//! The code of the device exists only for `nvptx64-nvidia-cuda`. So its lints and its documentation
//! are runs of their own, by the device compiler's clippy and rustdoc.

use std::env;
use std::path::Path;
use std::process::Command;

use framestride_builder::toolchain::{Toolchain, on_path};
use framestride_builder::{ARCH_VARIABLE, Arch, device_options};

use crate::{root, run, setup, step};

/// Crates that are not members of the workspace.
const OUTSIDE: [&str; 6] = [
    "engines/candle",
    "engines/cust",
    "tests/device",
    "kernel-builder/tests/fixtures/device",
    "kernel-builder/tests/fixtures/user",
    "kernel-builder/tests/fixtures/user/device",
];

/// Runs every check, even if one before it has failed.
pub fn run_all() -> Result<(), String> {
    let toolchain = setup::device_compiler()?;
    setup::linters(&toolchain)?;
    step("format, lints and documentation");
    // Tests share what was compiled with the cargo that compiled this process.
    let own = Path::new(env!("CARGO"));
    let host_cargo = if setup::has_linters(own) { own } else { &toolchain.cargo };
    let checks = [format(&toolchain), host(host_cargo), device(&toolchain), minimum_rust()];
    let failures: Vec<String> = checks.into_iter().filter_map(Result::err).collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

fn format(toolchain: &Toolchain) -> Result<(), String> {
    run(cargo(&toolchain.cargo).args(["fmt", "--all", "--check"]))?;
    OUTSIDE.iter().try_for_each(|folder| {
        let manifest = Path::new(folder).join("Cargo.toml");
        run(cargo(&toolchain.cargo).args(["fmt", "--check", "--manifest-path"]).arg(manifest))
    })
}

fn host(path: &Path) -> Result<(), String> {
    let clippy = ["clippy", "--quiet"];
    run(cargo(path).args(clippy).args(["--workspace", "--all-targets", "--", "-Dwarnings"]))?;
    // An engine may link any part of the library.
    for features in ["", "emulator", "templates"] {
        let part = ["-p", "framestride", "--no-default-features", "--features", features];
        run(cargo(path).args(clippy).args(part).args(["--", "-Dwarnings"]))?;
    }
    let mut doc = cargo(path);
    doc.args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings");
    // The kernels have their documentation for the device, and nobody links the other two.
    run(doc.args(["--exclude", "framestride-kernels", "--exclude", "framestride-tests", "--exclude", "xtask"]))
}

/// Checks the kernels for each family of GPUs. Checks a user's device crate too, with all that
/// `attention_kernels!` writes.
fn device(toolchain: &Toolchain) -> Result<(), String> {
    Arch::ALL.into_iter().try_for_each(|arch| {
        let options = device_options(toolchain, arch).map_err(|error| error.to_string())?;
        let documentation = options.iter().map(String::as_str).filter(|option| option.starts_with("--sysroot"));
        let documentation: Vec<&str> = documentation.chain(["-Dwarnings", "--document-private-items"]).collect();
        let cargo = |command: &str, manifest: &str| {
            let mut cargo = cargo(&toolchain.cargo);
            cargo.args([command, "--quiet", "--lib", "--target", "nvptx64-nvidia-cuda", "--manifest-path", manifest]);
            // Build scripts depend on RUSTC_BOOTSTRAP. In a shared folder they would run again and
            // again.
            cargo.env("RUSTC_BOOTSTRAP", "1").env(ARCH_VARIABLE, arch.name).args(["--target-dir", "target/device"]);
            cargo.env("CARGO_ENCODED_RUSTFLAGS", options.join("\x1f"));
            cargo.env("CARGO_ENCODED_RUSTDOCFLAGS", documentation.join("\x1f"));
            cargo
        };
        run(cargo("clippy", "gpu-kernels/Cargo.toml").args(["--", "-Dwarnings"]))?;
        run(cargo("clippy", "tests/device/Cargo.toml").args(["--", "-Dwarnings"]))?;
        run(cargo("doc", "gpu-kernels/Cargo.toml").arg("--no-deps"))
    })
}

/// Checks that the oldest Rust that Cargo.toml promises compiles what is published. Only rustup
/// provides an old one.
fn minimum_rust() -> Result<(), String> {
    let version = env!("CARGO_PKG_RUST_VERSION");
    if on_path("rustup").is_none() {
        step(&format!("NOT CHECKED without rustup: that Rust {version} compiles what is published"));
        return Ok(());
    }
    step(&format!("Rust {version}, the promised minimum"));
    let mut cargo = Command::new("rustup");
    cargo.args(["run", &setup::old_rust(version)?, "cargo", "check", "--quiet", "--workspace"]).current_dir(root());
    run(cargo.args(["--exclude", "framestride-tests", "--exclude", "xtask"]).env_remove("RUSTC").env_remove("CARGO"))
}

/// A cargo in the workspace's folder, which finds the tools beside it before a rustup proxy.
fn cargo(path: &Path) -> Command {
    let mut cargo = Command::new(path);
    let own = path.parent().map(Path::to_path_buf);
    let folders = env::var_os("PATH").unwrap_or_default();
    if let Ok(folders) = env::join_paths(own.into_iter().chain(env::split_paths(&folders))) {
        cargo.env("PATH", folders);
    }
    cargo.current_dir(root()).env("RUSTC", path.with_file_name("rustc")).env_remove("RUSTUP_TOOLCHAIN");
    cargo
}
