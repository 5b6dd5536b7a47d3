//! Sets up what is missing, and nothing else. It is the device compiler, ptxas and the disassembler
//! for the tests, what builds and judges their programs in C, clippy, rustfmt and an old Rust for
//! lints, and Python's packages.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use framestride_builder::toolchain::{
    self, CUDA_PACKAGES, CudaTools, DEBIAN_INSTALL, RUSTUP_INSTALL, Toolchain, on_path, setup_folder,
};
use indicatif::ProgressBar;

use crate::{root, shown, step};

/// Finds a device compiler, or installs one: by rustup if it is there, else from Debian's packages.
pub fn device_compiler() -> Result<Toolchain, String> {
    let missing = match toolchain::find() {
        Ok(found) => return Ok(announce(found)),
        Err(error) => error.to_string(),
    };
    let mut tried = Vec::new();
    let mut attempt = |installer: &str, command: &str| {
        on_path(installer)?;
        match install(command) {
            Ok(()) => toolchain::find().ok(),
            Err(error) => {
                tried.push(error);
                None
            }
        }
    };
    // Package lists may be older than the packages, so a second try follows an update.
    let found = attempt("rustup", RUSTUP_INSTALL)
        .or_else(|| attempt("apt-get", DEBIAN_INSTALL))
        .or_else(|| attempt("apt-get", "apt-get update"))
        .or_else(|| attempt("apt-get", DEBIAN_INSTALL));
    found.map(announce).ok_or_else(|| format!("{missing}\n{}", tried.join("\n")))
}

fn announce(found: Toolchain) -> Toolchain {
    step(&format!("device compiler: Rust {}, LLVM {} ({})", found.rustc_version, found.llvm_version, found.origin));
    found
}

/// Finds the device compiler's clippy and rustfmt, or installs them: by rustup if the compiler is
/// rustup's, else from Debian's packages.
pub fn linters(toolchain: &Toolchain) -> Result<(), String> {
    if has_linters(&toolchain.cargo) {
        return Ok(());
    }
    // Rustup keeps each toolchain in a folder of its name.
    let of_rustup = toolchain.sysroot.parent().is_some_and(|folder| folder.ends_with("toolchains"));
    match toolchain.sysroot.file_name().filter(|_| of_rustup) {
        Some(name) => install(&format!("rustup component add --toolchain {} clippy rustfmt", name.display())),
        None => install("apt-get install -y --no-install-recommends rust-web-clippy rustfmt-web"),
    }
}

/// Whether clippy and rustfmt lie beside a cargo.
pub fn has_linters(cargo: &Path) -> bool {
    ["cargo-clippy", "cargo-fmt"].iter().all(|tool| cargo.with_file_name(tool).is_file())
}

/// Rustup's name of the first release of a version such as `1.89`. It is installed if it is
/// missing.
pub fn old_rust(version: &str) -> Result<String, String> {
    let toolchain = format!("{version}.0");
    let mut rustc = Command::new("rustup");
    rustc.args(["run", &toolchain, "rustc", "--version"]).env("RUSTUP_AUTO_INSTALL", "0");
    if !rustc.output().is_ok_and(|answer| answer.status.success()) {
        install(&format!("rustup toolchain install {toolchain} --profile minimal --no-self-update"))?;
    }
    Ok(toolchain)
}

/// Finds ptxas and nvdisasm, or installs NVIDIA's Python packages into a virtual environment in the
/// cache.
pub fn cuda_tools() -> Result<CudaTools, String> {
    let complete = |tools: &CudaTools| tools.ptxas.is_some() && tools.nvdisasm.is_some();
    let found = CudaTools::find();
    if complete(&found) {
        return Ok(announce_tools(found));
    }
    let folder = setup_folder().ok_or("no folder for NVIDIA's tools: set FRAMESTRIDE_CACHE to one")?;
    let mend = format!(
        "install ptxas and nvdisasm of CUDA 13 and set FRAMESTRIDE_CUDA_BIN to their folder, or provide python3 with venv and pip for\n    pip install {}",
        CUDA_PACKAGES.join(" ")
    );
    virtual_environment(&folder, &CUDA_PACKAGES.join(" ")).map_err(|error| format!("{error}\n{mend}"))?;
    let found = CudaTools::find();
    if complete(&found) {
        Ok(announce_tools(found))
    } else {
        Err(format!("the packages are installed in {}, but do not hold the tools\n{mend}", folder.display()))
    }
}

fn announce_tools(found: CudaTools) -> CudaTools {
    if let Some(folder) = found.ptxas.as_deref().and_then(Path::parent) {
        step(&format!("ptxas and nvdisasm: {}", folder.display()));
    }
    found
}

/// Compilers of C and C++, valgrind, and the tools by which programs find a library, each with its
/// package of Debian's.
const C_TOOLS: [(&str, &str); 6] = [
    ("cc", "gcc"),
    ("c++", "g++"),
    ("valgrind", "valgrind"),
    ("pkg-config", "pkg-config"),
    ("cmake", "cmake"),
    ("meson", "meson"),
];

/// Finds what the tests of the C interface need, or installs it from Debian's packages. They are
/// tests of Linux alone.
pub fn c_tools() -> Result<(), String> {
    let missing: Vec<&str> =
        C_TOOLS.iter().filter(|(tool, _)| on_path(tool).is_none()).map(|&(_, package)| package).collect();
    if missing.is_empty() || !cfg!(target_os = "linux") {
        return Ok(());
    }
    let command = format!("apt-get install -y --no-install-recommends {}", missing.join(" "));
    install(&command).or_else(|_| install("apt-get update").and_then(|()| install(&command)))
}

/// Makes a Python virtual environment with what pip installs of `packages`. Installs Python if it is
/// missing.
fn virtual_environment(folder: &Path, packages: &str) -> Result<(), String> {
    if on_path("python3").is_none() {
        install("apt-get install -y --no-install-recommends python3 python3-venv")?;
    }
    let folder = folder.display();
    let fill = || {
        install(&format!("python3 -m venv --clear {folder}"))?;
        install(&format!("{folder}/bin/python3 -m pip install --quiet {packages}"))
    };
    fill().or_else(|first| {
        // Debian keeps venv's pip in a package of its own.
        install("apt-get install -y --no-install-recommends python3-venv")
            .and_then(|()| fill())
            .map_err(|second| format!("{first}\n{second}"))
    })
}

/// Makes a Python virtual environment in `target` with nothing but pip in it.
pub fn bare_python(name: &str) -> Result<PathBuf, String> {
    let folder = Path::new("target").join(name).join("environment");
    virtual_environment(&folder, "--upgrade pip")?;
    Ok(root().join(folder).join("bin/python3"))
}

/// Finds the Python of a virtual environment in `target` with the packages of a requirements file,
/// or makes one.
pub fn python(name: &str, requirements: &str) -> Result<PathBuf, String> {
    let folder = Path::new("target").join(name);
    let wanted = fs::read(root().join(requirements)).map_err(|error| format!("{requirements}: {error}"))?;
    // The copy in the environment comes last, so an environment that has it is whole.
    let installed = root().join(&folder).join("requirements.txt");
    if fs::read(&installed).ok().as_ref() != Some(&wanted) {
        virtual_environment(&folder, &format!("--no-compile --requirement {requirements}"))?;
        fs::write(&installed, wanted).map_err(|error| format!("{}: {error}", installed.display()))?;
    }
    Ok(root().join(folder).join("bin/python3"))
}

/// Runs an installer in the workspace's folder, and shows a spinner, and its output if it fails.
/// Debian's installer needs root. Another user runs it by `sudo`, which must not ask for a password.
fn install(command: &str) -> Result<(), String> {
    let mut words: Vec<&str> = command.split(' ').collect();
    if words[0] == "apt-get" && !is_root() {
        words.splice(0..0, ["sudo", "-n"]);
    }
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).current_dir(root());
    let shown = shown(&command);
    step(&shown);
    let spinner = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    spinner.enable_steady_tick(Duration::from_millis(100));
    let answer = command.output();
    spinner.finish_and_clear();
    let answer = answer.map_err(|error| format!("`{shown}` does not start: {error}"))?;
    if answer.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&answer.stderr);
    Err(format!("`{shown}` failed ({}):\n{}", answer.status, said.trim_end()))
}

fn is_root() -> bool {
    let answer = Command::new("id").arg("-u").output();
    answer.is_ok_and(|answer| answer.stdout.starts_with(b"0\n"))
}
