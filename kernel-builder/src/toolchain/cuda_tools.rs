//! NVIDIA's `ptxas` and `nvdisasm`.

use std::env;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{cache_folder, named, output};

/// The Python packages that hold ptxas and the disassembler.
pub const CUDA_PACKAGES: [&str; 2] = ["nvidia-cuda-nvcc==13.0.*", "nvidia-cuda-nvdisasm"];

/// NVIDIA's assembler and disassembler. Neither is needed to build kernels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CudaTools {
    /// Makes machine code of PTX, and reports registers, stack and spills.
    pub ptxas: Option<PathBuf>,
    /// Lists the machine code that ptxas makes.
    pub nvdisasm: Option<PathBuf>,
}

impl CudaTools {
    /// Looks in `FRAMESTRIDE_PTXAS` (ptxas only), `FRAMESTRIDE_CUDA_BIN`, the PATH, `CUDA_HOME`,
    /// `CUDA_PATH`, `/usr/local/cuda`, and the place where `cargo xtask test` installs them
    /// ([`setup_folder`]).
    pub fn find() -> CudaTools {
        let mut folders: Vec<PathBuf> = named("FRAMESTRIDE_CUDA_BIN").into_iter().collect();
        folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
        folders.extend(["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(named).map(|home| home.join("bin")));
        folders.push("/usr/local/cuda/bin".into());
        folders.extend(setup_folder().and_then(|folder| venv_cuda_bin(&folder)));
        let find = |name: &str| folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file());
        CudaTools {
            ptxas: named("FRAMESTRIDE_PTXAS").filter(|path| path.is_file()).or_else(|| find("ptxas")),
            nvdisasm: find("nvdisasm"),
        }
    }
}

/// Folder of the Python virtual environment with [`CUDA_PACKAGES`]; `None` without a cache folder.
pub fn setup_folder() -> Option<PathBuf> {
    cache_folder().map(|folder| folder.join("cuda-tools"))
}

/// The folder of the tools in a Python virtual environment:
/// `lib/python3.11/site-packages/nvidia/cu13/bin`.
fn venv_cuda_bin(venv: &Path) -> Option<PathBuf> {
    let entries = venv.join("lib").read_dir().ok()?;
    entries.flatten().map(|entry| entry.path().join("site-packages/nvidia/cu13/bin")).find(|path| path.is_dir())
}

/// How to get a tool that is missing.
pub(super) fn cuda_mend() -> String {
    format!("`cargo xtask test` installs it; or: pip install {}", CUDA_PACKAGES.join(" "))
}

/// `13.0.88` of "Cuda compilation tools, release 13.0, V13.0.88".
pub(crate) fn cuda_version(tool: &Path) -> Option<String> {
    let text = output(tool, &["--version"]).ok()?;
    let version = text.split(", V").nth(1)?;
    Some(version.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.to_string())
}
