//! Exchange between the 32 lanes of a warp (9.7.9.6, shfl.sync; 9.7.13.4, bar.warp.sync).

use core::arch::asm;

/// A register that lanes can exchange.
pub trait Register: Copy {
    /// Its bits.
    fn bits(self) -> u32;
    /// From its bits.
    fn from_bits(bits: u32) -> Self;
}

impl Register for u32 {
    #[inline(always)]
    fn bits(self) -> u32 {
        self
    }
    #[inline(always)]
    fn from_bits(bits: u32) -> u32 {
        bits
    }
}

impl Register for f32 {
    #[inline(always)]
    fn bits(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn from_bits(bits: u32) -> f32 {
        f32::from_bits(bits)
    }
}

/// Waits until all lanes are here. What one has stored before, the others may load then.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn sync() {
    asm!("bar.warp.sync -1;", options(nostack));
}

/// The value of the lane whose number differs in the bits of `mask`. Each lane has its own mask.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn exchange<T: Register>(value: T, mask: u32) -> T {
    let out: u32;
    asm!("shfl.sync.bfly.b32 {}, {}, {}, 31, -1;", out(reg32) out, in(reg32) value.bits(), in(reg32) mask, options(nostack));
    T::from_bits(out)
}

/// The value of lane `from`. Each lane may name another.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn broadcast<T: Register>(value: T, from: u32) -> T {
    let out: u32;
    asm!("shfl.sync.idx.b32 {}, {}, {}, 31, -1;", out(reg32) out, in(reg32) value.bits(), in(reg32) from, options(nostack));
    T::from_bits(out)
}

/// A value that all lanes have, in a uniform register (9.7.13.12, redux.sync).
///
/// ptxas does not always see that a value is the same in all lanes. Then it moves the value, and
/// all that follows from it, to a uniform register again and again.
///
/// # Safety
/// All 32 lanes come here with one value.
#[inline(always)]
pub unsafe fn uniform(value: u32) -> u32 {
    let out: u32;
    asm!("redux.sync.or.b32 {}, {}, -1;", out(reg32) out, in(reg32) value, options(nostack));
    out
}

/// The sum over groups of `WIDTH` neighbouring lanes (a power of two), in every lane of the group.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn sum<const WIDTH: u32>(mut value: f32) -> f32 {
    let mut mask = WIDTH / 2;
    while mask > 0 {
        value += exchange(value, mask);
        mask /= 2;
    }
    value
}

/// The maximum over groups of `WIDTH` neighbouring lanes, in every lane of the group. NaN counts as
/// absent.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn max<const WIDTH: u32>(mut value: f32) -> f32 {
    let mut mask = WIDTH / 2;
    while mask > 0 {
        value = value.max(exchange(value, mask));
        mask /= 2;
    }
    value
}

/// The lanes in which `condition` holds, one bit each (9.7.13.9, vote.sync).
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn ballot(condition: bool) -> u32 {
    let out: u32;
    asm!(
        "{{ .reg .pred %holds; setp.ne.u32 %holds, {1}, 0; vote.sync.ballot.b32 {0}, %holds, -1; }}",
        out(reg32) out, in(reg32) condition as u32, options(nostack)
    );
    out
}

/// Whether `condition` holds in any lane.
///
/// # Safety
/// All 32 lanes come here.
#[inline(always)]
pub unsafe fn any(condition: bool) -> bool {
    let out: u32;
    asm!(
        "{{ .reg .pred %any; setp.ne.u32 %any, {1}, 0; vote.sync.any.pred %any, %any, -1; selp.u32 {0}, 1, 0, %any; }}",
        out(reg32) out, in(reg32) condition as u32, options(nostack)
    );
    out != 0
}
