//! `framestride verify`: the kernels of a spec against the f64 reference.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use framestride::Result;
use framestride_check::verify::{Effort, VerifyReport};

use crate::device_options::{DeviceOptions, check_memory};
use crate::outcome::{Outcome, to_json};
use crate::progress::Bar;
use crate::spec_argument::read_spec;

/// Compares each kernel with the f64 reference, on fresh random inputs, and a profiled layer with
/// itself.
///
/// Run again, the layer must give the same bytes. On a GPU it must also give them in a CUDA graph
/// and on two streams at a time. The graph is replayed up to 1000 times, with inputs that change in
/// between. Of large layers, there are as many runs as fit some seconds. The emulator has neither
/// graphs nor streams.
#[derive(Args)]
pub struct Verify {
    /// The spec.
    spec: String,
    #[command(flatten)]
    on: DeviceOptions,
    /// Seed of the inputs. Without it, the clock gives one.
    #[arg(long)]
    seed: Option<u64>,
    /// Run no further case after one that fails.
    #[arg(long)]
    fail_fast: bool,
}

/// Verifies kernels.
pub fn verify(Verify { spec, on, seed, fail_fast }: Verify) -> Result<Outcome> {
    let bar = Bar::new();
    let spec = read_spec(&spec)?;
    let device = on.choose_for(&spec)?;
    check_memory(&spec, &device)?;
    let module = on.load(&spec, &device, &bar)?;
    // The seed differs each time unless one is given. It is printed, so that a failure can be had
    // again.
    let clock =
        || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64 % 1_000_000_007);
    let seed = seed.unwrap_or_else(clock);
    let effort = Effort { fail_fast, ..Effort::default() };
    let report = framestride_check::verify::verify(&module, seed, effort, &|what, part| bar.say(what, Some(part)))?;
    drop(bar);
    Ok(Outcome::new(verify_text(&report), to_json(&report), report.ok))
}

fn verify_text(report: &VerifyReport) -> String {
    let VerifyReport { spec, family, device, seed, .. } = report;
    let mut text = format!("{spec}, kernels of {family}, on {device} (seed {seed})\n");
    if !report.reduced.is_empty() {
        text += &format!("\nmemory has no room for more than\n  {}\n", report.reduced.join("\n  "));
    }
    let mut case = "";
    for check in report.checks.as_slice() {
        if check.case != case {
            case = &check.case;
            text += &format!("\n{case}\n");
        }
        let verdict = if check.ok { "ok    " } else { "FAILED" };
        text += &format!(
            "  {verdict} {:<9} {:<25} error {:9.2e} of {:8.2e}, {} of {} {}",
            check.kernel, check.quantity, check.rel_error, check.tolerance, check.compared, check.of, check.unit
        );
        if !check.ok {
            text += &format!("  ({})", check.worst);
        }
        text.push('\n');
    }
    text.push('\n');
    let (all, failed) = (report.checks.as_slice().len(), report.checks.failed().count());
    text + &match failed {
        0 => format!("all {all} checks passed\n"),
        _ => format!("{failed} of {all} checks failed\n"),
    }
}
