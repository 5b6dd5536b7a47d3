//! Embeds the shipped kernels, with the feature `shipped`: every `kernels/NAME.json` with its
//! `NAME.ptx`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_SHIPPED").is_none() {
        return Ok(());
    }
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?).join("kernels");
    println!("cargo::rerun-if-changed={}", kernels.display());
    let mut names: Vec<String> = fs::read_dir(&kernels)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.strip_suffix(".json").map(str::to_owned))
        .collect();
    names.sort();
    let mut table = String::from("&[\n");
    for name in names {
        let file = |extension| kernels.join(format!("{name}.{extension}"));
        let (ptx, manifest) = (file("ptx"), file("json"));
        table += &format!("({name:?}, include_str!({ptx:?}), include_str!({manifest:?})),\n");
    }
    table += "]\n";
    let out = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?).join("shipped.rs");
    fs::write(out, table)
}
