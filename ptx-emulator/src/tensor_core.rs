//! Tensor cores: matrix products of a warp or of a warpgroup. Each family of instructions has one
//! module.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`wgmma`] | the family of Hopper (sm_90a): asynchronous products of a warpgroup |
//! | [`mma_sync`] | the family of Ampere (sm_80): products of a warp in registers |
//! | [`ldmatrix`] | `ldmatrix` and `stmatrix`, which move matrices between memory and fragments |
//! | [`fragment`] | which row and column each value in a lane's registers is |
//! | [`sums`] | how products are aligned, cut and added: the bits of a result |
//!
//! A new family gets a module here with all that is its own:
//!
//! * the type of its instructions,
//! * how they are decoded from statements (`impl Decoder`),
//! * how a warp executes them (`impl Warp`).
//!
//! Three other files name it:
//!
//! * `isa`: a variant of `Op` holds its instructions,
//! * `decode`: the table of opcodes has its opcode,
//! * `warp`: the execution of operations has the variant.
//!
//! The formulas of this room come from the PTX ISA and from results of GPUs. They share no code
//! with `framestride-shapes`, from which the kernels take theirs. The emulator judges the kernels,
//! and it would not see a mistake that it shares with them.

pub(crate) mod fragment;
pub(crate) mod ldmatrix;
pub(crate) mod mma_sync;
pub(crate) mod sums;
pub(crate) mod wgmma;

use crate::float::{bf16_to_f32, e4m3_to_f32, f16_to_f32};

/// The type of a product's factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ElementType {
    Bf16,
    F16,
    E4m3,
}

impl ElementType {
    /// How many elements a register holds.
    #[inline(always)]
    fn per_register(self) -> usize {
        match self {
            ElementType::Bf16 | ElementType::F16 => 2,
            ElementType::E4m3 => 4,
        }
    }

    /// The value of one of the elements that a register holds. The first is the lowest.
    #[inline(always)]
    fn value(self, register: u32, i: usize) -> f32 {
        match self {
            ElementType::Bf16 => bf16_to_f32(register >> (16 * i) & 0xffff),
            ElementType::F16 => f16_to_f32(register >> (16 * i) & 0xffff),
            ElementType::E4m3 => e4m3_to_f32(register >> (8 * i) & 0xff),
        }
    }

    /// How many k one `wgmma` multiplies: 32 bytes of a row of A.
    #[inline(always)]
    fn k(self) -> usize {
        8 * self.per_register()
    }

    /// The exponent of the smallest normal number, which is the exponent of subnormal ones too.
    #[inline(always)]
    fn smallest_exponent(self) -> i16 {
        match self {
            ElementType::Bf16 => -126,
            ElementType::F16 => -14,
            ElementType::E4m3 => -6,
        }
    }
}
