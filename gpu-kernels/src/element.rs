//! The element types of Q, K, V and O.

use core::arch::asm;

use framestride_shapes::dtype::Dtype;

/// bf16 or f16. A register holds two of them, the first in its low half.
pub trait Element: Copy {
    /// log2 of the weight that a row's maximum gets. It is more than 0 where the exponent is
    /// narrow, to keep small weights away from its end.
    const HEADROOM: f32;
    /// The type, as a spec names it.
    const DTYPE: Dtype;
    /// Rounds two f32 to nearest even.
    fn pack(low: f32, high: f32) -> u32;
    /// Widens both halves. This is exact.
    fn unpack(pair: u32) -> [f32; 2];
}

/// bfloat16: the upper half of an f32.
#[derive(Clone, Copy)]
pub struct Bf16;

/// IEEE half precision.
#[derive(Clone, Copy)]
pub struct F16;

impl Element for Bf16 {
    const HEADROOM: f32 = 0.0;
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        let pair: u32;
        // SAFETY: this is arithmetic on registers.
        unsafe {
            asm!("cvt.rn.bf16x2.f32 {}, {}, {};", out(reg32) pair, in(reg32) high, in(reg32) low, options(pure, nomem, nostack))
        };
        pair
    }
    #[inline(always)]
    fn unpack(pair: u32) -> [f32; 2] {
        [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)]
    }
}

impl Element for F16 {
    const HEADROOM: f32 = 8.0;
    const DTYPE: Dtype = Dtype::F16;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        let pair: u32;
        // SAFETY: this is arithmetic on registers.
        unsafe {
            asm!("cvt.rn.f16x2.f32 {}, {}, {};", out(reg32) pair, in(reg32) high, in(reg32) low, options(pure, nomem, nostack))
        };
        pair
    }
    #[inline(always)]
    fn unpack(pair: u32) -> [f32; 2] {
        let (low, high): (f32, f32);
        // SAFETY: this is arithmetic on registers.
        unsafe {
            asm!(
                "{{ .reg .b16 %l, %h; mov.b32 {{%l, %h}}, {2}; cvt.f32.f16 {0}, %l; cvt.f32.f16 {1}, %h; }}",
                out(reg32) low, out(reg32) high, in(reg32) pair, options(pure, nomem, nostack)
            )
        };
        [low, high]
    }
}

/// Rounds four f32 to e4m3, the first into the lowest byte. What is too large becomes 448.
#[inline(always)]
pub fn pack_e4m3([a, b, c, d]: [f32; 4]) -> u32 {
    let four: u32;
    // SAFETY: this is arithmetic on registers.
    unsafe {
        asm!(
            "{{ .reg .b16 %l, %h; cvt.rn.satfinite.e4m3x2.f32 %l, {2}, {1}; cvt.rn.satfinite.e4m3x2.f32 %h, {4}, {3}; mov.b32 {0}, {{%l, %h}}; }}",
            out(reg32) four, in(reg32) a, in(reg32) b, in(reg32) c, in(reg32) d, options(pure, nomem, nostack)
        )
    };
    four
}

/// Widens four e4m3, the lowest byte first. This is exact.
#[inline(always)]
pub fn unpack_e4m3(four: u32) -> [f32; 4] {
    let (a, b): (u32, u32);
    // SAFETY: this is arithmetic on registers.
    unsafe {
        asm!(
            "{{ .reg .b16 %l, %h; mov.b32 {{%l, %h}}, {2}; cvt.rn.f16x2.e4m3x2 {0}, %l; cvt.rn.f16x2.e4m3x2 {1}, %h; }}",
            out(reg32) a, out(reg32) b, in(reg32) four, options(pure, nomem, nostack)
        )
    };
    let ([a, b], [c, d]) = (F16::unpack(a), F16::unpack(b));
    [a, b, c, d]
}

/// Widens the eight elements of 16 bytes.
#[inline(always)]
pub fn widen<E: Element>(chunk: [u32; 4]) -> [f32; 8] {
    let [[a, b], [c, d], [e, f], [g, h]] = chunk.map(E::unpack);
    [a, b, c, d, e, f, g, h]
}

/// Rounds eight values into 16 bytes.
#[inline(always)]
pub fn narrow<E: Element>(x: [f32; 8]) -> [u32; 4] {
    [E::pack(x[0], x[1]), E::pack(x[2], x[3]), E::pack(x[4], x[5]), E::pack(x[6], x[7])]
}
