//! What an engine links that brings its own kernels: few crates, and none for files, pictures or
//! random numbers.

use std::collections::BTreeSet;
use std::process::Command;

use crate::checkout;

/// The most crates that `framestride` without default features may bring.
const MOST: usize = 40;

/// Crates that an engine would not have for this.
const NEVER: [&str; 8] = ["clap", "image", "indicatif", "rand", "rayon", "safetensors", "tempfile", "ptx-emulator"];

#[test]
fn an_engine_links_few_crates() {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["tree", "--locked", "--package", "framestride", "--no-default-features"]);
    let output = cargo.args(["--edges", "normal", "--prefix", "none"]).current_dir(checkout(".")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // A line is `NAME vVERSION` and remarks.
    let text = String::from_utf8(output.stdout).unwrap();
    let crates: BTreeSet<String> =
        text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert!(crates.iter().any(|name| name.starts_with("cudarc ")), "{crates:?}");
    assert!(crates.len() <= MOST, "{} crates: {crates:?}", crates.len());
    for name in NEVER {
        assert!(!crates.iter().any(|found| found.starts_with(&format!("{name} "))), "{name} in {crates:?}");
    }
}
