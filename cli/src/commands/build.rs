//! `framestride build`: from a spec to PTX and manifest.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use framestride::shapes::arch::Arch;
use framestride::{Error, Result};
use serde_json::json;

use crate::outcome::Outcome;
use crate::output::Output;
use crate::progress::Bar;
use crate::spec_argument::read_spec;

/// Builds the kernels of a spec: NAME.ptx and its manifest NAME.json.
#[derive(Args)]
pub struct Build {
    /// The spec.
    spec: String,
    /// The family of GPUs, such as sm_90a.
    #[arg(long, default_value = Arch::SM_90A.name)]
    arch: String,
    /// Folder for the two files.
    #[arg(long, default_value = ".")]
    out: PathBuf,
}

/// Builds kernels.
pub fn build(Build { spec: argument, arch, out }: Build) -> Result<Outcome> {
    let build_error = |error: framestride_builder::BuildError| Error::Build(error.to_string());
    let arch = arch.parse::<Arch>().map_err(|error| Error::Build(error.to_string()))?;
    let spec = read_spec(&argument)?;
    std::fs::create_dir_all(&out).map_err(|error| Error::file(&out, error))?;
    let output = |extension| Output::new(&out.join(format!("{}.{extension}", spec.name)), &[Path::new(&argument)]);
    let outputs = [output("ptx")?, output("json")?];
    let bar = Bar::new();
    bar.say(&format!("building {}", spec.source.file), None);
    let started = Instant::now();
    let built = framestride_builder::Kernels::from_parsed(&spec).arch(arch).build().map_err(build_error)?;
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    outputs[0].write(built.ptx.as_bytes())?;
    outputs[1].write(built.manifest.to_json().as_bytes())?;
    let files: Vec<String> = outputs.iter().map(|output| output.path().display().to_string()).collect();
    let mut lines = format!("{} in {seconds:.1} s: {}\n", built.name, files.join(", "));
    for kernel in &built.manifest.kernels {
        lines +=
            &format!("  {:<10} {:>4} threads, {:>6} bytes shared", kernel.entry, kernel.threads, kernel.shared_bytes);
        if let Some(ptxas) = &kernel.ptxas {
            lines += &format!(", {} registers, {} stack, {} spilled", ptxas.registers, ptxas.stack, ptxas.spill_stores);
        }
        lines.push('\n');
    }
    let json = json!({ "name": built.name, "seconds": seconds, "files": files, "kernels": built.manifest.kernels });
    Ok(Outcome::new(lines, json, true))
}
