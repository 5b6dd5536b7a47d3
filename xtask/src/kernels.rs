//! Makes the shipped kernels again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use framestride_builder::{Arch, Kernels, Progress};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{root, setup, step};

/// Makes `host/kernels/NAME.ptx` and `.json` of every `shapes/models/NAME.toml`. Files of specs
/// that no longer exist are removed.
pub fn make() -> Result<(), String> {
    setup::device_compiler()?;
    // Without ptxas the manifests would lose their report of registers and spills.
    setup::cuda_tools()?;
    let specs = files(&root().join("shapes/models"), &["toml"])?;
    let folder = root().join("host/kernels");
    let start = Instant::now();
    let bar = ProgressBar::new(specs.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let shown = bar.clone();
    let built = Kernels::from_specs(&specs)
        .arch(Arch::SM_90A)
        .out_dir(&folder)
        .on_progress(move |progress| match progress {
            Progress::Compiling(name) => shown.set_message(format!("compiling {name}")),
            Progress::Translating(name) => shown.set_message(format!("translating {name}")),
            Progress::Done(_) => shown.inc(1),
            _ => {}
        })
        .build_all();
    bar.finish_and_clear();
    let built = built.map_err(|error| error.to_string())?;
    for file in files(&folder, &["ptx", "json"])? {
        let stem = file.file_stem().unwrap_or_default();
        if !built.iter().any(|built| *built.name == *stem) {
            fs::remove_file(&file).map_err(|error| format!("cannot remove {}: {error}", file.display()))?;
            step(&format!("removed {}: its spec is gone", file.display()));
        }
    }
    step(&format!("{} kernels in {} ({:.0} s)", built.len(), folder.display(), start.elapsed().as_secs_f64()));
    Ok(())
}

/// Files of a folder with one of these extensions, sorted.
fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|found| extensions.iter().any(|known| found == *known)));
    files.sort();
    Ok(files)
}
