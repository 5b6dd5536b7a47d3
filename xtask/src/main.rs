//! The commands of the README, `cargo xtask demo` and `cargo xtask test`, and those of maintainers.

mod bench;
mod install;
mod kernels;
mod lint;
mod mutants;
mod python;
mod setup;

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;

const USAGE: &str = "usage: cargo xtask COMMAND

  demo          build, and run the main job on Big Buck Bunny; pictures go to demo-report/
  test [ARGS]   set up what is missing, ptxas and disassembler included, lint, run every test, and plant a dozen
                mutants; or, with ARGS, run what cargo test ARGS runs
  lint          format, lints and documentation, of the code for the GPU too, and the promised minimum Rust
  kernels       make the shipped templates of kernels again: host/kernels
  mutants [NAME ...]
                plant mistakes in the kernels, all of tests/mutants/mutants.toml or those named, and expect verify
                to see each
  diffusers [FAMILY ...]
                compare dense attention with the models of diffusers, or with those whose names have one of these
                parts, in a Python environment of its own (5 GB in target/diffusers)
  install-c PREFIX [--debug]
                build the C library, and put it into PREFIX/lib, its header into PREFIX/include, and what
                pkg-config reads into PREFIX/lib/pkgconfig
  engines       lint and test what engines use: engines/candle on the emulator, engines/cust without linking it, and
                engines/xfuser, engines/vllm_omni and engines/sglang on the emulator, in the environment of `python`
                (4 minutes the first time, and those of `python`)
  wheel         make the wheel of the Python package in dist/, and try it where there is no PyTorch
  python [ARGS] make the wheel, and run the tests of the Python package, with ARGS for pytest, in an environment with
                PyTorch and diffusers of its own (6 GB in target/python)
  bench-build   time builds of kernels, from nothing and again
  doctor        what was found and what is missing, without the GPU (framestride doctor has it too)
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (command, rest) = arguments.split_first().map_or(("", &[][..]), |(first, rest)| (first.as_str(), rest));
    let result = match (command, rest) {
        ("demo", []) => demo(),
        ("test", rest) => test(rest),
        ("lint", []) => lint::run_all(),
        ("kernels", []) => kernels::make(),
        ("mutants", names) => mutants::plant(mutants::Choice::Named(names)),
        ("diffusers", families) => diffusers(families),
        ("install-c", [prefix]) => install::c_library(prefix, false),
        ("install-c", [prefix, debug]) if debug == "--debug" => install::c_library(prefix, true),
        ("engines", []) => engines(),
        ("wheel", []) => python::wheel(),
        ("python", arguments) => python::test(arguments),
        ("bench-build", []) => bench::run(),
        ("doctor", []) => {
            print!("{}", framestride_builder::toolchain::Inventory::new());
            Ok(())
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask {command}: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Builds everything and runs the main job on real frames.
fn demo() -> Result<(), String> {
    step("building framestride, then the main job on Big Buck Bunny: 16 frames of 72 x 128 pixels");
    run(cargo()
        .args(["run", "--release", "--package", "framestride-cli", "--", "run", "shapes/models/demo.toml"])
        .args(["--video", "cli/data/bigbuckbunny_16x72x128.safetensors", "--report", "demo-report"]))?;
    step(&format!("pictures: {}", root().join("demo-report").display()));
    Ok(())
}

/// Runs every test. Without arguments it also lints, and plants a dozen mutants.
fn test(arguments: &[String]) -> Result<(), String> {
    setup::device_compiler()?;
    setup::cuda_tools()?;
    setup::c_tools()?;
    if !arguments.is_empty() {
        return cargo_test(arguments);
    }
    // Each of the two leaves a core idle at times, and needs nothing of the other.
    thread::scope(|scope| {
        let beside = scope.spawn(|| [python::test_specs(), lint::run_all()]);
        let tests = cargo_test(&["--workspace".into()]).and_then(|()| mutants::plant(mutants::Choice::Ci));
        let beside = beside.join().map_err(|_| "a thread panicked")?;
        let failures: Vec<String> = beside.into_iter().chain([tests]).filter_map(Result::err).collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
    })
}

fn cargo_test(arguments: &[String]) -> Result<(), String> {
    step(&format!("cargo test {}", arguments.join(" ")));
    // A snapshot that differs is a failure, never a new file.
    run(cargo().args(["test", "--no-fail-fast"]).args(arguments).env("INSTA_UPDATE", "no"))
}

/// Compares dense attention with the models of diffusers.
fn diffusers(families: &[String]) -> Result<(), String> {
    let python = setup::python("diffusers", "tests/diffusers/requirements.txt")?;
    run(cargo().args(["build", "--package", "framestride-cli"]))?;
    step("dense attention of diffusers and of framestride, on the emulator");
    let script = ["tests/diffusers/compare.py", "target/debug/framestride"];
    run(Command::new(python).args(script).args(families).current_dir(root()))
}

/// Lints and tests the crates for engines in Rust, and tests what engines in Python use. The crates
/// are no members of the workspace, since what they depend on takes minutes to compile.
fn engines() -> Result<(), String> {
    let cargo = |command: &str, engine: &str| {
        let mut cargo = cargo();
        cargo.args([command, "--target-dir", "target/engines", "--manifest-path"]);
        cargo.arg(format!("engines/{engine}/Cargo.toml"));
        cargo
    };
    step("candle, on the emulator");
    let all = ["--features", "emulator"];
    run(cargo("clippy", "candle").args(all).args(["--all-targets", "--", "-Dwarnings"]))?;
    run(cargo("doc", "candle").args(all).arg("--no-deps").env("RUSTDOCFLAGS", "-Dwarnings"))?;
    run(cargo("test", "candle").args(all).env("RUST_BACKTRACE", "0"))?;
    step("cust, which is compiled but not linked");
    // With this variable, cust's build does not look for CUDA.
    run(cargo("clippy", "cust").args(["--", "-Dwarnings"]).env("DOCS_RS", "1"))?;
    python::test_engines()
}

/// Prints one line about what is done next.
fn step(text: &str) {
    eprintln!("==> {text}");
}

/// The workspace's folder.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap_or_else(|_| PathBuf::from("."))
}

/// The cargo that compiled this process, in the workspace's folder.
fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root());
    cargo
}

/// Runs a command to its end. Its output goes to the terminal.
fn run(command: &mut Command) -> Result<(), String> {
    let shown = shown(command);
    let status = command.status().map_err(|error| format!("`{shown}` does not start: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{shown}` failed ({status})")) }
}

/// A command as a user would type it.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
