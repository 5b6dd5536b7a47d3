//! Launches as data: [`SparseAttention::launches`](crate::SparseAttention::launches) writes them
//! before anything runs.

use framestride_shapes::params::{AttentionParams, JudgeParams, PackParams, ProfileParams, SelectParams};
use framestride_shapes::spec::Spec;

/// The kernels of a module, which has those that its spec needs.
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
    /// Computes sparse attention in 8 bits.
    AttentionE4m3 = 7,
    /// Computes the errors of 8 bits, and chooses the precisions.
    Judge = 8,
}

impl Kernel {
    /// All kernels, indexed by their value.
    pub(crate) const ALL: [Kernel; 9] = [
        Kernel::Pack,
        Kernel::Profile,
        Kernel::Select,
        Kernel::Attention,
        Kernel::Center,
        Kernel::PackE4m3,
        Kernel::PackValues,
        Kernel::AttentionE4m3,
        Kernel::Judge,
    ];

    /// Whether a spec needs it.
    pub(crate) fn is_of(self, spec: &Spec) -> bool {
        let [in_16_bits, in_8_bits] = spec.precisions();
        match self {
            Kernel::Pack | Kernel::Profile | Kernel::Select => true,
            Kernel::Attention => in_16_bits,
            Kernel::Center | Kernel::PackE4m3 | Kernel::PackValues | Kernel::AttentionE4m3 => in_8_bits,
            Kernel::Judge => in_16_bits && in_8_bits,
        }
    }

    /// Whether it writes or reads images in 8 bits.
    pub(crate) fn has_e4m3_images(self) -> bool {
        matches!(self, Kernel::PackE4m3 | Kernel::PackValues | Kernel::AttentionE4m3)
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
            Kernel::AttentionE4m3 => "attention_e4m3",
            Kernel::Judge => "judge",
        }
    }

    /// Bytes of the parameter block that the host writes.
    pub(crate) const fn params_bytes(self) -> usize {
        match self {
            Kernel::Pack | Kernel::Center | Kernel::PackE4m3 | Kernel::PackValues => size_of::<PackParams>(),
            Kernel::Profile => size_of::<ProfileParams>(),
            Kernel::Select => size_of::<SelectParams>(),
            Kernel::Attention | Kernel::AttentionE4m3 => size_of::<AttentionParams>(),
            Kernel::Judge => size_of::<JudgeParams>(),
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
    Judge(JudgeParams),
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
            Params::Judge(params) => bytes(params),
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

/// What one layer launches. There are launches in 8 bits, in 16 bits (the type of the tensors) or
/// both.
#[derive(Clone, Copy, Debug)]
#[must_use]
#[non_exhaustive]
pub struct Launches {
    /// What finds the types of the heads, where they are profiled.
    pub profiling: Option<Profiling>,
    /// What computes heads in 8 bits.
    pub eight_bits: Option<EightBits>,
    /// What computes heads in 16 bits.
    pub sixteen_bits: Option<SixteenBits>,
}

/// What finds the types of the heads.
#[derive(Clone, Copy, Debug)]
#[must_use]
#[non_exhaustive]
pub struct Profiling {
    /// What profiles all keys. Where all heads multiply in 8 bits, it is the first half of them.
    pub keys: ProfiledKeys,
    /// What profiles the other half then. Its packed rows come in the place of those of the first.
    pub other_keys: Option<ProfiledKeys>,
    /// Computes the errors of the masks, and chooses the types.
    pub select: Launch,
}

/// What profiles all keys or half of them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ProfiledKeys {
    /// Packs K and V of all heads in the spatial layout. The first one packs the sampled rows of Q
    /// too.
    pub pack: Launch,
    /// Computes the sampled rows under all masks.
    pub profile: Launch,
}

impl Profiling {
    /// The launches that profile keys, in the order in which they must run.
    pub fn of_keys(&self) -> impl Iterator<Item = &ProfiledKeys> {
        std::iter::once(&self.keys).chain(&self.other_keys)
    }

    /// All launches in the order in which they must run.
    pub fn in_order(&self) -> impl Iterator<Item = &Launch> {
        self.of_keys().flat_map(|ProfiledKeys { pack, profile }| [pack, profile]).chain([&self.select])
    }
}

/// What computes heads in 8 bits.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct EightBits {
    /// Measures V.
    pub center: Launch,
    /// Packs Q and K.
    pub pack: Launch,
    /// Packs V.
    pub pack_values: Launch,
    /// Attention of the heads.
    pub attention: Launch,
    /// Finds the precisions of the heads, where a bound says so. Then all heads have been computed
    /// in 8 bits, and those that exceed it are computed again.
    pub judge: Option<Launch>,
}

/// What computes heads in 16 bits.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SixteenBits {
    /// Packs the heads. Where all heads multiply in 16 bits, after profiling it packs Q, and K and
    /// V of those heads that turned out to be temporal.
    pub pack: Launch,
    /// Attention of the heads.
    pub attention: Launch,
}

impl Launches {
    /// The launches in the order in which they must run.
    pub fn in_order(&self) -> impl Iterator<Item = &Launch> {
        let profiling = self.profiling.iter().flat_map(Profiling::in_order);
        let eight_bits =
            self.eight_bits.iter().flat_map(|EightBits { center, pack, pack_values, attention, judge }| {
                [center, pack, pack_values, attention].into_iter().chain(judge)
            });
        let sixteen_bits = self.sixteen_bits.iter().flat_map(|SixteenBits { pack, attention }| [pack, attention]);
        profiling.chain(eight_bits).chain(sixteen_bits)
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
        assert_eq!(Kernel::Pack.params_bytes(), 9 * TENSOR + 6 * NORM + 13 * 8 + 8 * 4);
        assert_eq!(Kernel::Profile.params_bytes(), 7 * 8 + 8 * 4);
        assert_eq!(Kernel::Select.params_bytes(), 3 * 8 + 4 * 4);
        assert_eq!(Kernel::Attention.params_bytes(), 3 * 8 + TENSOR + 7 * 8 + 6 * 4);
        assert_eq!(Kernel::Judge.params_bytes(), 6 * 8 + TENSOR + 4 * 4);
    }
}
