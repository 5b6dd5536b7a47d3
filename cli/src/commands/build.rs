//! `framestride build`: from a spec to PTX and manifest.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use framestride::Kernels;
use framestride::shapes::arch::Arch;
use serde_json::json;

use crate::outcome::Outcome;
use crate::output::{Output, make_folder};
use crate::progress::Bar;
use crate::spec_argument::read_spec;

/// Compiles the kernels of a spec, with the spec's numbers as constants: NAME.ptx and its manifest
/// NAME.json. It needs the device compiler.
///
/// No other command needs these files: kernels of any spec come from the templates in this program.
#[derive(Args)]
pub struct Build {
    /// The spec.
    spec: String,
    /// The family of the kernels: sm_90a for Hopper, or sm_80 for every GPU since Ampere.
    #[arg(long, value_name = "NAME", default_value = Arch::SM_90A.name)]
    family: Arch,
    /// Write what the other commands load, the template with the spec's numbers, and compile nothing.
    #[arg(long)]
    template: bool,
    /// Folder for the two files.
    #[arg(long, default_value = ".")]
    out: PathBuf,
}

/// Builds kernels.
pub fn build(Build { spec: argument, family, template, out }: Build) -> Result<Outcome, Box<dyn std::error::Error>> {
    let spec = read_spec(&argument)?;
    make_folder(&out)?;
    let output = |extension| Output::new(&out.join(format!("{}.{extension}", spec.name)), &[Path::new(&argument)]);
    let outputs = [output("ptx")?, output("json")?];
    let bar = Bar::new();
    bar.say(&format!("building {}", spec.source.file), None);
    let started = Instant::now();
    let (ptx, manifest) = if template {
        let filled = Kernels::for_spec(&spec, family)?;
        (filled.ptx().to_string(), filled.manifest().clone())
    } else {
        let built = framestride_builder::Kernels::from_parsed(&spec).arch(family).build()?;
        (built.ptx, built.manifest)
    };
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    outputs[0].write(ptx.as_bytes())?;
    outputs[1].write(manifest.to_json().as_bytes())?;
    let files: Vec<String> = outputs.iter().map(|output| output.path().display().to_string()).collect();
    let mut lines = format!("{}, kernels of {}, in {seconds:.1} s: {}\n", manifest.name, family.name, files.join(", "));
    for kernel in &manifest.kernels {
        lines +=
            &format!("  {:<10} {:>4} threads, {:>6} bytes shared", kernel.entry, kernel.threads, kernel.shared_bytes);
        if let Some(ptxas) = &kernel.ptxas {
            lines += &format!(", {} registers, {} stack, {} spilled", ptxas.registers, ptxas.stack, ptxas.spill_stores);
        }
        lines.push('\n');
    }
    let json = json!({ "name": manifest.name, "seconds": seconds, "files": files, "kernels": manifest.kernels });
    Ok(Outcome::new(lines, json, true))
}
