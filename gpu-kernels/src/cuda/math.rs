//! Special functions (9.7.3). They are the hardware's approximations, and each says its error.

use core::arch::asm;

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = $instruction:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            let y: f32;
            // SAFETY: this is arithmetic on registers.
            unsafe { asm!(concat!($instruction, " {}, {};"), out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
            y
        }
    )*};
}

unary! {
    /// 2^x. The relative error is below 2^-22.
    exp2 = "ex2.approx.ftz.f32";
    /// log2 x. Near 1 the absolute error is below 2^-22, elsewhere the relative one.
    log2 = "lg2.approx.ftz.f32";
    /// 1 / x. The relative error is below 2^-23.
    reciprocal = "rcp.approx.ftz.f32";
    /// 1 / sqrt x. The relative error is below 2^-22.
    reciprocal_sqrt = "rsqrt.approx.ftz.f32";
}

/// x y + z in one rounding.
#[inline(always)]
pub fn fma(x: f32, y: f32, z: f32) -> f32 {
    let out: f32;
    // SAFETY: this is arithmetic on registers.
    unsafe {
        asm!("fma.rn.ftz.f32 {}, {}, {}, {};", out(reg32) out, in(reg32) x, in(reg32) y, in(reg32) z,
             options(pure, nomem, nostack))
    };
    out
}

macro_rules! of_two_bf16 {
    ($($(#[$doc:meta])* $name:ident = $instruction:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: u32, y: u32) -> u32 {
            let z: u32;
            // SAFETY: this is arithmetic on registers.
            unsafe {
                asm!(concat!($instruction, " {}, {}, {};"), out(reg32) z, in(reg32) x, in(reg32) y,
                     options(pure, nomem, nostack))
            };
            z
        }
    )*};
}

of_two_bf16! {
    /// The smaller of each of two bf16, or the one that is a number.
    min_bf16x2 = "min.bf16x2";
    /// The larger of each of two bf16, or the one that is a number.
    max_bf16x2 = "max.bf16x2";
    /// The product of each of two bf16, rounded to nearest.
    mul_bf16x2 = "mul.rn.bf16x2";
}

/// Four bytes of ones or zeros: the signs of four of the eight bytes of `low` and `high`. Each
/// digit of `SELECTOR`, the lowest first, is 8 plus the number of a byte (9.7.7.7, prmt).
#[inline(always)]
pub fn byte_signs<const SELECTOR: u32>(low: u32, high: u32) -> u32 {
    let out: u32;
    // SAFETY: this is arithmetic on registers.
    unsafe {
        asm!("prmt.b32 {}, {}, {}, {};", out(reg32) out, in(reg32) low, in(reg32) high, const SELECTOR,
             options(pure, nomem, nostack))
    };
    out
}

/// `sum + summand` if a bit of `bits` is set, else `sum`. The addition is predicated, where LLVM
/// would select a summand.
#[inline(always)]
pub fn add_if(bits: u32, bit: u32, mut sum: f32, summand: f32) -> f32 {
    // SAFETY: this is arithmetic on registers.
    unsafe {
        asm!(
            "{{ .reg .pred %is_set; .reg .b32 %bit; and.b32 %bit, {}, {}; setp.ne.u32 %is_set, %bit, 0; @%is_set add.f32 {2}, {2}, {3}; }}",
            in(reg32) bits, in(reg32) bit, inout(reg32) sum, in(reg32) summand,
            options(pure, nomem, nostack)
        );
    }
    sum
}

/// 0 in a register of its own. LLVM may give a plain 0 the register of an accumulator, and then the
/// builder cannot see that all lanes have the same value.
#[inline(always)]
pub fn own_zero() -> u32 {
    let zero: u32;
    // SAFETY: this is arithmetic on registers.
    unsafe { asm!("mov.b32 {}, 0;", out(reg32) zero, options(pure, nomem, nostack)) };
    zero
}

/// x, but the compiler knows nothing of it. So it does not compute parts of what follows before a
/// loop and keep each in a register.
#[inline(always)]
pub fn opaque(mut x: u32) -> u32 {
    // SAFETY: the assembly is a comment.
    unsafe { asm!("// {0}", inout(reg32) x, options(nomem, nostack)) };
    x
}
