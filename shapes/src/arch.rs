//! The families of GPUs that kernels exist for. `no_std`.
//!
//! [`Arch::ALL`] is the table, and each family is one row of it. Compilers, limits and checks of
//! devices read the row. The tiles of a family are in [`blocks`](crate::blocks), its products are
//! in the macros, and its kernel bodies stand beside those of the others.

/// A family of GPUs that one set of kernel bodies serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Arch {
    /// The family's name for every compiler: rustc's `target-cpu`, LLVM's `-mcpu`, ptxas's `-arch`
    /// and `.target` in PTX.
    pub name: &'static str,
    /// GPUs of the family, for messages.
    pub gpus: &'static str,
    /// The least and the greatest compute capability (major, minor) that runs the kernels.
    pub capabilities: [(u32, u32); 2],
    /// Version (major, minor) of the PTX that is written: old enough for the drivers in use, new
    /// enough for the instructions.
    pub ptx_version: (u32, u32),
    /// The first driver that compiles this PTX, as CUDA counts drivers: 12030 is 12.3.
    pub least_driver: i32,
    /// Which instructions multiply matrices. Kernel bodies are written for them.
    pub products: Products,
    /// The most threads of a block.
    pub block_threads: u32,
    /// The most blocks that a multiprocessor holds.
    pub blocks: u32,
    /// The most shared memory that a block can ask for, in bytes.
    pub block_shared_bytes: u32,
    /// The shared memory of a multiprocessor, in bytes. Its blocks divide it.
    pub shared_bytes: u32,
    /// What a block takes of it beyond what it asks for, in bytes.
    pub reserved_shared_bytes: u32,
    /// The 32-bit registers of a multiprocessor. Its threads divide them.
    pub registers: u32,
}

/// The environment variable by which the builder tells the macros of kernels the name of the family
/// that they are compiled for. Without it, that is the default one.
#[cfg(feature = "std")]
pub const ARCH_VARIABLE: &str = "FRAMESTRIDE_ARCH";

/// Which instructions multiply matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Products {
    /// `wgmma`: a warpgroup multiplies 64 rows by a swizzled image in shared memory, which the copy
    /// engine has brought (`cp.async.bulk`).
    Wgmma,
    /// `mma.sync`: a warp multiplies what it has loaded from shared memory (`ldmatrix`), where threads
    /// have copied it (`cp.async`).
    MmaSync,
}

impl Arch {
    /// Hopper, with the instructions that only it has.
    pub const SM_90A: Arch = Arch {
        name: "sm_90a",
        gpus: "Hopper (H100, H200, GH200)",
        capabilities: [(9, 0), (9, 0)],
        ptx_version: (8, 3),
        least_driver: 12030,
        products: Products::Wgmma,
        block_threads: 1024,
        blocks: 32,
        block_shared_bytes: 227 * 1024,
        shared_bytes: 228 * 1024,
        reserved_shared_bytes: 1024,
        registers: 64 * 1024,
    };

    /// Every GPU since Ampere. Limits are those of its least: a GPU of compute capability 8.0 or 9.0 has
    /// more shared memory.
    pub const SM_80: Arch = Arch {
        name: "sm_80",
        gpus: "Ampere or later (A100, RTX 3060 to 5090, B200)",
        capabilities: [(8, 0), (u32::MAX, u32::MAX)],
        ptx_version: (8, 0),
        least_driver: 12000,
        products: Products::MmaSync,
        block_threads: 1024,
        blocks: 16,
        block_shared_bytes: 99 * 1024,
        shared_bytes: 100 * 1024,
        reserved_shared_bytes: 1024,
        registers: 64 * 1024,
    };

    /// All families. A GPU that runs the kernels of several takes the first.
    pub const ALL: [Arch; 2] = [Arch::SM_90A, Arch::SM_80];

    /// Names of all families, for messages: `sm_90a`.
    #[cfg(feature = "std")]
    pub fn names() -> String {
        Arch::ALL.map(|arch| arch.name).join(", ")
    }

    /// The family of this name.
    pub fn named(name: &str) -> Option<Arch> {
        Arch::ALL.into_iter().find(|arch| arch.name == name)
    }

    /// The compute capabilities that run the kernels, for messages: `9.0 (sm_90a)`.
    #[cfg(feature = "std")]
    pub fn shown_capabilities(self) -> String {
        let [(major, minor), greatest] = self.capabilities;
        let end = match greatest {
            (u32::MAX, _) => " or later".into(),
            greatest if greatest == (major, minor) => String::new(),
            (major, minor) => format!(" to {major}.{minor}"),
        };
        format!("{major}.{minor}{end} ({})", self.name)
    }

    /// Whether a GPU of this compute capability (major, minor) runs the kernels.
    pub fn runs_on(self, capability: (u32, u32)) -> bool {
        let [least, greatest] = self.capabilities;
        (least..=greatest).contains(&capability)
    }
}

impl Default for Arch {
    fn default() -> Arch {
        Arch::SM_90A
    }
}

/// A name that no family has.
#[cfg(feature = "std")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownArch {
    /// What was asked for.
    pub found: String,
}

#[cfg(feature = "std")]
impl core::fmt::Display for UnknownArch {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        let found = crate::text::plain(&self.found, 100);
        write!(f, "there are no kernels for `{found}`: the families are {}", Arch::names())
    }
}

#[cfg(feature = "std")]
impl std::error::Error for UnknownArch {}

#[cfg(feature = "std")]
impl core::str::FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(name: &str) -> Result<Arch, UnknownArch> {
        Arch::named(name).ok_or_else(|| UnknownArch { found: name.into() })
    }
}
