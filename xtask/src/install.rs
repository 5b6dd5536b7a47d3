//! `cargo xtask install-c`: the C library where engines look for one, as `make install` does it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::{cargo, root, run, step};

/// Installs below `prefix`: the shared and the static library in `lib`, the header in `include`, and
/// what pkg-config reads in `lib/pkgconfig`. `debug` is for tests, which need not wait for a release
/// build.
pub fn c_library(prefix: &str, debug: bool) -> Result<(), String> {
    let mut build = cargo();
    build.args(["build", "--package", "framestride-capi", "--target-dir", "target"]);
    run(if debug { &mut build } else { build.arg("--release") })?;
    let built = root().join("target").join(if debug { "debug" } else { "release" });
    // A program may lie anywhere, so what it is told about has no place of its own.
    let prefix = std::path::absolute(prefix).map_err(|error| format!("{prefix}: {error}"))?;
    let template = root().join("capi/framestride.pc.in");
    let text = fs::read_to_string(&template).map_err(|error| format!("{}: {error}", template.display()))?;
    let text = text.replace("@PREFIX@", &prefix.display().to_string()).replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    let from = |path: PathBuf| fs::read(&path).map_err(|error| format!("{}: {error}", path.display()));
    for (target, bytes, mode) in [
        ("lib/libframestride.so", from(built.join("libframestride.so"))?, 0o755),
        ("lib/libframestride.a", from(built.join("libframestride.a"))?, 0o644),
        ("include/framestride.h", from(root().join("capi/include/framestride.h"))?, 0o644),
        ("lib/pkgconfig/framestride.pc", text.into_bytes(), 0o644),
    ] {
        let target = prefix.join(target);
        place(&target, &bytes, mode).map_err(|error| format!("{}: {error}", target.display()))?;
        step(&target.display().to_string());
    }
    Ok(())
}

/// Writes a file beside its place and moves it there. So programs that have the old one open keep it.
fn place(target: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let new = target.with_extension("new");
    fs::create_dir_all(target.parent().unwrap_or(Path::new("/")))?;
    fs::write(&new, bytes)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
    fs::rename(&new, target)
}
