//! `cargo xtask wheel`, `cargo xtask python`, and a part of `cargo xtask engines`: the Python package,
//! and its tests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use crate::{install, root, run, setup, step};

/// Makes the wheel in `dist`, and tries it in an environment of its own that has no PyTorch.
pub fn wheel() -> Result<(), String> {
    let python = setup::bare_python("wheel")?;
    remove_old_wheels().map_err(|error| format!("dist: {error}"))?;
    step("a wheel of python/, in dist/");
    run(pip(&python).args(["wheel", "--quiet", "--no-deps", "--wheel-dir", "dist", "./python"]))?;
    install_wheel(&python)?;
    // Isolated, it finds the installed package and nothing of the checkout.
    run(of_checkout(&python).args(["-I", "python/tests/without_torch.py"]))
}

/// Makes the wheel, and runs all tests of the package, in an environment with PyTorch and diffusers.
pub fn test(arguments: &[String]) -> Result<(), String> {
    let python = with_torch()?;
    step("tests of the Python package, on the emulator");
    run(of_checkout(&python).args(["-m", "pytest", "python/tests", "engines/comfyui/tests"]).args(arguments))?;
    run(of_checkout(&python).args(["-m", "mypy", "--strict", "python/framestride"]))
}

/// Runs the tests of what engines in Python use, in the same environment. The engines' packages are
/// installed there without what they need, which is gigabytes.
pub fn test_engines() -> Result<(), String> {
    let python = with_torch()?;
    let packages = ["--no-deps", "--no-compile", "--requirement", "engines/requirements.txt"];
    run(pip(&python).args(["install", "--quiet"]).args(packages))?;
    ["xfuser", "vllm_omni", "sglang"].iter().try_for_each(|engine| {
        step(&format!("{engine}, on the emulator"));
        let tests = format!("engines/{engine}/tests");
        run(of_checkout(&python).args(["-W", "ignore", "-m", "pytest", "--quiet", &tests]))
    })
}

/// Makes the wheel, and installs it where PyTorch and diffusers are.
fn with_torch() -> Result<PathBuf, String> {
    wheel()?;
    let python = setup::python("python", "python/tests/requirements.txt")?;
    install_wheel(&python)?;
    Ok(python)
}

/// Runs the tests that need no PyTorch, with the library of this build. `cargo xtask test` does it too.
pub fn test_specs() -> Result<(), String> {
    let python = setup::python("python-specs", "python/tests/requirements_specs.txt")?;
    install::build_debug()?;
    step("tests of the Python package that need no PyTorch");
    let library = root().join("target/debug/libframestride.so");
    run(of_checkout(&python)
        .args(["-m", "pytest", "--quiet", "python/tests/spec_test.py", "python/tests/study_test.py"])
        .env("PYTHONPATH", "python")
        .env("FRAMESTRIDE_LIBRARY", library))
}

/// Installs the wheel of `dist`, in place of one of the same version.
fn install_wheel(python: &Path) -> Result<(), String> {
    let from_dist = ["--no-index", "--find-links", "dist", "--no-deps", "--force-reinstall", "framestride"];
    run(pip(python).args(["install", "--quiet"]).args(from_dist))
}

fn remove_old_wheels() -> io::Result<()> {
    let folder = root().join("dist");
    fs::create_dir_all(&folder)?;
    let files: Vec<PathBuf> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    files.iter().filter(|file| file.extension().is_some_and(|end| end == "whl")).try_for_each(fs::remove_file)
}

fn pip(python: &Path) -> Command {
    let mut command = of_checkout(python);
    command.args(["-m", "pip"]);
    command
}

/// A Python in the workspace's folder that takes package and library from the wheel alone.
fn of_checkout(python: &Path) -> Command {
    let mut command = Command::new(python);
    command.current_dir(root()).env_remove("PYTHONPATH").env_remove("FRAMESTRIDE_LIBRARY");
    command
}
