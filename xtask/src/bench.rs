//! Times builds of kernels: from nothing, of another spec, of a changed spec, and of one that did
//! not change.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use framestride_builder::{Kernels, Spec};
use indicatif::ProgressBar;

use crate::{root, setup, step};

/// The most seconds of the first build of a spec on two idle cores. It compiles `core` and the
/// procedural macros.
const FIRST: f64 = 40.0;
/// The most seconds of any later build.
const NEXT: f64 = 5.0;

/// Prints the times beside their limits, and fails if one is over its limit.
pub fn run() -> Result<(), String> {
    setup::device_compiler()?;
    let cache = tempfile::tempdir().map_err(|error| format!("no folder for a fresh cache: {error}"))?;
    let models = root().join("shapes/models");
    let read = |name: &str| {
        let path = models.join(name);
        fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))
    };
    let (demo, large) = (read("demo.toml")?, read("hunyuan_video_720p.toml")?);
    let changed = large.replace("tokens = 256", "tokens = 512");
    if changed == large {
        return Err("hunyuan_video_720p.toml has no `tokens = 256` to change".into());
    }
    let builds = [
        ("first build, from nothing", &demo, FIRST),
        ("another spec, head dim 128", &large, NEXT),
        ("the same spec, changed", &changed, NEXT),
        ("the same spec, unchanged", &changed, NEXT),
    ];
    let mut over = false;
    for (what, spec, limit) in builds {
        let seconds = time(spec, cache.path())?;
        over |= seconds > limit;
        println!("{what:<28} {seconds:6.1} s   limit {limit:4.0} s{}", if seconds > limit { "   OVER" } else { "" });
    }
    if over { Err("a build took longer than its limit (the limits are for two idle cores)".into()) } else { Ok(()) }
}

fn time(spec: &str, cache: &Path) -> Result<f64, String> {
    let parsed = Spec::parse("bench.toml", spec).map_err(|error| error.to_string())?;
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    let start = Instant::now();
    let built = Kernels::from_parsed(&parsed).cache_dir(cache).build();
    spinner.finish_and_clear();
    let built = built.map_err(|error| error.to_string())?;
    let seconds = start.elapsed().as_secs_f64();
    step(&format!("{}: {} lines of PTX", built.name, built.ptx.lines().count()));
    Ok(seconds)
}
