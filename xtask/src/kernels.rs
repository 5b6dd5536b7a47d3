//! Makes the shipped templates again.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use flate2::{Compression, GzBuilder};
use framestride_builder::{Arch, Kernels, Progress};
use indicatif::ProgressBar;

use crate::{root, setup, step};

/// Makes `host/kernels/NAME.ptx.gz` and `NAME.json` of every template, and removes what else lies
/// there.
pub fn make() -> Result<(), String> {
    setup::device_compiler()?;
    let folder = root().join("host/kernels");
    let start = Instant::now();
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(200));
    let shown = bar.clone();
    let show = move |progress| match progress {
        Progress::Compiling(name) => shown.set_message(format!("compiling {name}")),
        Progress::Translating(name) => shown.set_message(format!("translating {name}")),
        _ => {}
    };
    let build = |arch| Kernels::templates(arch).on_progress(show.clone()).build_all();
    let built: Result<Vec<_>, _> = Arch::ALL.into_iter().map(build).collect();
    bar.finish_and_clear();
    let built = built.map_err(|error| error.to_string())?.concat();
    let mut kept = vec!["README.md".to_string()];
    let mut bytes = 0;
    for template in &built {
        let compressed = compress(&template.ptx)?;
        bytes += compressed.len();
        let files = [("ptx.gz", compressed), ("json", template.manifest.to_json().into_bytes())];
        for (extension, contents) in files {
            let name = format!("{}.{extension}", template.name);
            let path = folder.join(&name);
            fs::write(&path, contents).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            kept.push(name);
        }
    }
    let entries = fs::read_dir(&folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
    for entry in entries.flatten().filter(|entry| !kept.iter().any(|name| entry.file_name() == **name)) {
        let path = entry.path();
        fs::remove_file(&path).map_err(|error| format!("cannot remove {}: {error}", path.display()))?;
        step(&format!("removed {}: it belongs to no template", path.display()));
    }
    let (count, seconds) = (built.len(), start.elapsed().as_secs_f64());
    step(&format!("{count} templates of {} KiB in {} ({seconds:.0} s)", bytes / 1024, folder.display()));
    Ok(())
}

/// Compresses a text. The result depends on nothing but the text.
fn compress(text: &str) -> Result<Vec<u8>, String> {
    let mut writer = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    writer
        .write_all(text.as_bytes())
        .and_then(|()| writer.finish())
        .map_err(|error| format!("cannot compress: {error}"))
}
