//! Builds a spec to PTX and manifest: `cargo run -p framestride-builder --example build --
//! SPEC.toml OUT_DIR`. A folder in place of the spec is a device crate.

use std::path::Path;
use std::time::Instant;

use framestride_builder::{BuildError, Kernels};

fn main() -> Result<(), String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [source, out_dir] = &arguments[..] else { return Err("usage: build SPEC.toml|CRATE OUT_DIR".into()) };
    build(Path::new(source), out_dir).map_err(|error| error.to_string())
}

fn build(source: &Path, out_dir: &str) -> Result<(), BuildError> {
    let start = Instant::now();
    let kernels = if source.is_dir() { Kernels::from_crate(source) } else { Kernels::from_spec(source) };
    let built = kernels.out_dir(out_dir).build()?;
    for warning in &built.warnings {
        eprintln!("{warning}");
    }
    for kernel in &built.manifest.kernels {
        println!(
            "{}: {} threads, {} bytes shared, {:?}",
            kernel.entry, kernel.threads, kernel.shared_bytes, kernel.ptxas
        );
    }
    println!("{}: {} lines of PTX in {:.1} s", built.name, built.ptx.lines().count(), start.elapsed().as_secs_f64());
    Ok(())
}
