//! `cargo xtask install-c`: the C library where engines look for one, as `make install` does it.

use std::path::Path;
use std::{fs, io};

use crate::{cargo, root, run, step};

/// Installs below `prefix`: the shared and the static library in `lib`, the header in `include`, and
/// what pkg-config reads in `lib/pkgconfig`. `debug` is for tests, which need not wait for a release
/// build.
pub fn c_library(prefix: &str, debug: bool) -> Result<(), String> {
    if debug {
        build_debug()?;
    } else {
        run(cargo().args(["build", "--package", "framestride-capi", "--target-dir", "target", "--release"]))?;
    }
    let built = root().join("target").join(if debug { "debug" } else { "release" });
    let failed = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
    // The text has the whole path, since programs are compiled anywhere.
    let prefix = std::path::absolute(prefix).map_err(|error| failed(prefix.as_ref(), error))?;
    for (source, folder) in [
        (built.join("libframestride.so"), "lib"),
        (built.join("libframestride.a"), "lib"),
        (root().join("capi/include/framestride.h"), "include"),
    ] {
        let target = prefix.join(folder).join(source.file_name().unwrap_or_default());
        place(&target, |new| fs::copy(&source, new).map(drop)).map_err(|error| failed(&target, error))?;
    }
    let template = root().join("capi/framestride.pc.in");
    let text = fs::read_to_string(&template).map_err(|error| failed(&template, error))?;
    let text = text.replace("@PREFIX@", &prefix.display().to_string()).replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    let target = prefix.join("lib/pkgconfig/framestride.pc");
    place(&target, |new| fs::write(new, text)).map_err(|error| failed(&target, error))
}

/// Builds the library for tests, into `target/debug`. Beside the whole workspace and its examples,
/// dependencies have the features that they have for `cargo test --workspace`, and are not compiled
/// again.
pub fn build_debug() -> Result<(), String> {
    run(cargo().args(["build", "--workspace", "--lib", "--examples", "--target-dir", "target"]))
}

/// Makes a file beside its place and moves it there. So programs that have the old one open keep it.
fn place(target: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    step(&target.display().to_string());
    fs::create_dir_all(target.with_file_name(""))?;
    let new = target.with_extension("new");
    make(&new)?;
    fs::rename(&new, target)
}
