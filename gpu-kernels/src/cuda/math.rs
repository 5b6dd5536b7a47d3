//! Special functions (9.7.3): the hardware's approximations, with their errors.

use core::arch::asm;

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = $instruction:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            let y: f32;
            // SAFETY: arithmetic on registers.
            unsafe { asm!(concat!($instruction, " {}, {};"), out(reg32) y, in(reg32) x, options(pure, nomem, nostack)) };
            y
        }
    )*};
}

unary! {
    /// 2^x, relative error below 2^-22.
    exp2 = "ex2.approx.ftz.f32";
    /// log2 x, absolute error below 2^-22 near 1, relative elsewhere.
    log2 = "lg2.approx.ftz.f32";
    /// 1 / x, relative error below 2^-23.
    reciprocal = "rcp.approx.ftz.f32";
    /// 1 / sqrt x, relative error below 2^-22.
    reciprocal_sqrt = "rsqrt.approx.ftz.f32";
}

/// x y + z in one rounding.
#[inline(always)]
pub fn fma(x: f32, y: f32, z: f32) -> f32 {
    let out: f32;
    // SAFETY: arithmetic on registers.
    unsafe {
        asm!("fma.rn.ftz.f32 {}, {}, {}, {};", out(reg32) out, in(reg32) x, in(reg32) y, in(reg32) z,
             options(pure, nomem, nostack))
    };
    out
}

/// 2^x for x <= 0, without the special-function unit: for where that unit is the bottleneck (FlashAttention-4). Relative error
/// below 7.5e-5, a small part of the rounding of a weight to two bytes; below 2^-126 it returns about 2^-126.
///
/// x = n + f with n an integer and |f| <= 1/2; 2^f is the cubic of least relative error on that interval; n goes into the exponent.
#[inline(always)]
pub fn exp2_on_fma(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which stands in the low bits of the sum.
    const TO_INTEGER: f32 = 12_582_912.0;
    let x = x.max(-126.0);
    let shifted = x + TO_INTEGER;
    let f = x - (shifted - TO_INTEGER);
    let power = fma(fma(fma(0.055_171_67, f, 0.242_611_13), f, 0.693_260_97), f, 0.999_928_06);
    f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23))
}
