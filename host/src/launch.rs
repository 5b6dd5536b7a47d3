//! Launches as data: [`SparseAttention::launches`](crate::SparseAttention::launches) writes them
//! before anything runs.

use framestride_shapes::dtype::Compute;
use framestride_shapes::params::{AttentionParams, PackParams, ProfileParams, SelectParams};

/// The kernels of a module. Those behind [`Kernel::Attention`] are there for attention in 8 bits
/// alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(usize)]
pub enum Kernel {
    /// Normalises, rotates and reorders Q, K and V into packed images.
    Pack = 0,
    /// Computes the sampled rows under all masks.
    Profile = 1,
    /// Computes the errors of the masks, and chooses the types.
    Select = 2,
    /// Computes sparse attention.
    Attention = 3,
    /// Measures V for attention in 8 bits.
    Center = 4,
    /// Normalises, rotates and reorders Q and K into packed images of 8 bits.
    PackE4m3 = 5,
    /// Reorders V into packed images of 8 bits.
    PackValues = 6,
}

impl Kernel {
    /// All kernels, indexed by their value.
    pub(crate) const ALL: [Kernel; 7] = [
        Kernel::Pack,
        Kernel::Profile,
        Kernel::Select,
        Kernel::Attention,
        Kernel::Center,
        Kernel::PackE4m3,
        Kernel::PackValues,
    ];

    /// Whether a module that multiplies so in attention has it.
    pub(crate) fn is_of(self, compute: Compute) -> bool {
        compute == Compute::E4m3 || self as usize <= Kernel::Attention as usize
    }

    /// Name of the entry in the PTX.
    #[must_use]
    pub const fn entry(self) -> &'static str {
        match self {
            Kernel::Pack => "pack",
            Kernel::Profile => "profile",
            Kernel::Select => "select",
            Kernel::Attention => "attention",
            Kernel::Center => "center",
            Kernel::PackE4m3 => "pack_e4m3",
            Kernel::PackValues => "pack_values",
        }
    }

    /// Bytes of the parameter block that the host writes.
    pub(crate) const fn params_bytes(self) -> usize {
        match self {
            Kernel::Pack | Kernel::Center | Kernel::PackE4m3 | Kernel::PackValues => size_of::<PackParams>(),
            Kernel::Profile => size_of::<ProfileParams>(),
            Kernel::Select => size_of::<SelectParams>(),
            Kernel::Attention => size_of::<AttentionParams>(),
        }
    }
}

/// The parameter block of a kernel.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "a box would allocate at each launch")]
pub(crate) enum Params {
    Pack(PackParams),
    Profile(ProfileParams),
    Select(SelectParams),
    Attention(AttentionParams),
}

impl Params {
    pub fn as_bytes(&self) -> &[u8] {
        fn bytes<T>(params: &T) -> &[u8] {
            // SAFETY: the blocks are `repr(C)`, and hold integers and floats only, in an order
            // without padding (the test below adds up their fields). So every byte is initialised.
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast(), size_of::<T>()) }
        }
        match self {
            Params::Pack(params) => bytes(params),
            Params::Profile(params) => bytes(params),
            Params::Select(params) => bytes(params),
            Params::Attention(params) => bytes(params),
        }
    }
}

/// One launch of one kernel, with all of its parameters.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Launch {
    pub(crate) kernel: Kernel,
    /// Blocks along x, y and z.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
    pub(crate) params: Params,
}

impl Launch {
    /// The kernel that is launched.
    pub const fn kernel(&self) -> Kernel {
        self.kernel
    }
}

/// What one layer launches.
#[derive(Clone, Copy, Debug)]
#[must_use]
#[non_exhaustive]
pub struct Launches {
    /// What finds the types of the heads, where they are profiled.
    pub profiling: Option<Profiling>,
    /// Packs the heads for attention.
    pub packing: Packing,
    /// Attention of all heads.
    pub attention: Launch,
}

/// What finds the types of the heads.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Profiling {
    /// Packs Q, K and V of all heads in the spatial layout.
    pub pack: Launch,
    /// Computes the sampled rows under all masks.
    pub profile: Launch,
    /// Computes the errors of the masks, and chooses the types.
    pub select: Launch,
}

/// What packs heads for attention.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "a box would allocate at each launch")]
pub enum Packing {
    /// Packs all heads. After profiling it packs those again that turned out to be temporal.
    Dtype(Launch),
    /// Packs all heads for attention in 8 bits: **center**, **pack_e4m3** and **pack_values**.
    E4m3([Launch; 3]),
}

impl Packing {
    /// The launches in the order in which they must run.
    pub fn as_slice(&self) -> &[Launch] {
        match self {
            Packing::Dtype(launch) => std::slice::from_ref(launch),
            Packing::E4m3(launches) => launches,
        }
    }
}

impl Launches {
    /// The launches in the order in which they must run.
    pub fn in_order(&self) -> impl Iterator<Item = &Launch> {
        let profiling = self.profiling.iter();
        let profiling = profiling.flat_map(|Profiling { pack, profile, select }| [pack, profile, select]);
        profiling.chain(self.packing.as_slice()).chain([&self.attention])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of the blocks are those of their fields, 8-byte and 4-byte words.
    #[test]
    fn parameter_blocks_have_no_padding() {
        const TENSOR: usize = 4 * 8;
        const NORM: usize = 2 * 8;
        assert_eq!(Kernel::Pack.params_bytes(), 9 * TENSOR + 6 * NORM + 11 * 8 + 6 * 4);
        assert_eq!(Kernel::Profile.params_bytes(), 7 * 8 + 6 * 4);
        assert_eq!(Kernel::Select.params_bytes(), 3 * 8 + 4 * 4);
        assert_eq!(Kernel::Attention.params_bytes(), 3 * 8 + TENSOR + 6 * 8 + 6 * 4);
    }
}
