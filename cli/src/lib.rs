//! The `framestride` command: describes, builds, verifies, runs, studies, times and draws the sparse
//! attention of a spec.
//!
//! `commands` has one file for each subcommand: its arguments, what it does, and the text that it
//! prints. They share `spec_argument` (which spec), `device_options` (where kernels run), `outcome`
//! (what is printed, and the exit code) and `output` (files that are written).
//!
//! Tests and other programs read a layer's tensors with [`tensor_files`], and make a layer of a
//! video's pixels with [`video`].
#![warn(missing_docs)]

mod commands;
mod device_options;
mod outcome;
mod output;
mod pictures;
mod progress;
mod spec_argument;
pub mod tensor_files;
pub mod video;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use commands::bench::Bench;
use commands::build::Build;
use commands::describe::Describe;
use commands::plot::Plot;
use commands::run::Run;
use commands::study::Study;
use commands::verify::Verify;
use framestride::Error;
use framestride::shapes::text::{MESSAGE_BYTES, plain};
use output::{print, unless_closed};
use serde_json::json;

/// Sparse attention for video diffusion transformers, on kernels made for the model's shape.
///
/// SPEC is the name of a shipped spec, such as `demo`, or a TOML file (`./demo` for one of that
/// name). Exit codes: 0 done, 1 a check failed, 2 bad input.
#[derive(Parser)]
#[command(version, name = "framestride")]
struct Cli {
    /// Print one JSON value instead of text.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Describe(Describe),
    Build(Build),
    Verify(Verify),
    Run(Run),
    Study(Study),
    Bench(Bench),
    Plot(Plot),
    /// Shows what was found on this machine and what is missing: device compiler, tools, GPU.
    Doctor,
}

/// The exit code when a check failed, or a kernel faulted.
const FAILED: u8 = 1;

/// The exit code when something is wrong with what the command was given.
const BAD_INPUT: u8 = 2;

/// Runs the command that the process' arguments name.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) if usage.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => usage.exit(),
        Err(usage) if usage.use_stderr() => {
            eprintln!("{}", plain(usage.render().to_string().trim_end(), MESSAGE_BYTES));
            return ExitCode::from(BAD_INPUT);
        }
        // This way to write help has colours.
        Err(help) => {
            let written = unless_closed(help.print()).map_err(|error| Error::file("standard output", error));
            return written.and_then(|()| print("")).map_or_else(fail, |()| ExitCode::SUCCESS);
        }
    };
    let outcome = match cli.command {
        Command::Describe(arguments) => commands::describe::describe(arguments),
        // The builder has errors of its own.
        Command::Build(arguments) => return end(commands::build::build(arguments), cli.json),
        Command::Verify(arguments) => commands::verify::verify(arguments),
        Command::Run(arguments) => commands::run::run(arguments),
        Command::Study(arguments) => commands::study::study(arguments),
        Command::Bench(arguments) => commands::bench::bench(arguments),
        Command::Plot(arguments) => commands::plot::plot(arguments),
        Command::Doctor => Ok(commands::doctor::doctor()),
    };
    end(outcome.map_err(Into::into), cli.json)
}

/// Prints what a command found or why it did not, and gives its exit code.
fn end(outcome: Result<outcome::Outcome, Box<dyn std::error::Error>>, json: bool) -> ExitCode {
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            if json {
                let text = format!("{:#}\n", json!({ "ok": false, "error": error.to_string() }));
                if let Err(error) = print(&text) {
                    return fail(error);
                }
            }
            return fail(error);
        }
    };
    let text = if json { format!("{:#}\n", outcome.json) } else { outcome.text };
    if outcome.aside {
        eprint!("{text}");
    } else if let Err(error) = print(&text) {
        return fail(error);
    }
    match outcome.unwritten {
        Some(error) => fail(error),
        None => ExitCode::from(if outcome.ok { 0 } else { FAILED }),
    }
}

/// Prints an error, and gives its exit code.
fn fail(error: impl Into<Box<dyn std::error::Error>>) -> ExitCode {
    let error = error.into();
    // A kernel that faults has failed its check.
    let failed = matches!(error.downcast_ref(), Some(Error::Emulator(_) | Error::Driver { .. }));
    let text = plain(&error.to_string(), MESSAGE_BYTES).into_owned();
    let prefix = if text.starts_with("error") { "" } else { "error: " };
    eprintln!("{prefix}{}", text.trim_end());
    ExitCode::from(if failed { FAILED } else { BAD_INPUT })
}
