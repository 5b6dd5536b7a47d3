//! The block's dynamic shared memory. Addresses have 32 bits, and the first byte is 1024-byte
//! aligned (5.1.6, Shared State Space).

use core::arch::{asm, global_asm};
use framestride_shapes::shared::Parts;

global_asm!(".extern .shared .align 1024 .b8 dyn_smem[];");

/// Address of the first byte.
#[inline(always)]
pub fn base() -> u32 {
    let address: u32;
    // SAFETY: the symbol is declared above.
    unsafe { asm!("mov.u32 {}, dyn_smem;", out(reg32) address, options(pure, nomem, nostack)) };
    address
}

/// Address of part `index`.
#[inline(always)]
pub fn address(parts: Parts, index: u32) -> u32 {
    (base() + parts.region) + (parts.offset + index * parts.distance)
}

/// Stores 16 bytes.
///
/// # Safety
/// `address` is 16-byte aligned and inside the block's shared memory.
#[inline(always)]
pub unsafe fn store16(address: u32, value: [u32; 4]) {
    asm!(
        "st.shared.v4.b32 [{}], {{{}, {}, {}, {}}};",
        in(reg32) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
        options(nostack)
    );
}

/// Loads 16 bytes.
///
/// # Safety
/// As [`store16`], and written before.
#[inline(always)]
pub unsafe fn load16(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!(
        "ld.shared.v4.b32 {{{}, {}, {}, {}}}, [{}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
        options(nostack)
    );
    [a, b, c, d]
}

/// Loads 8 bytes.
///
/// # Safety
/// The address is valid and a multiple of 8.
#[inline(always)]
pub unsafe fn load8(address: u32) -> [u32; 2] {
    let (a, b): (u32, u32);
    asm!("ld.shared.v2.b32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b, in(reg32) address, options(nostack));
    [a, b]
}

/// Stores an f32.
///
/// # Safety
/// `address` is 4-byte aligned and inside the block's shared memory.
#[inline(always)]
pub unsafe fn store_f32(address: u32, value: f32) {
    asm!("st.shared.f32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack));
}

/// Loads an f32.
///
/// # Safety
/// As [`store_f32`], and written before.
#[inline(always)]
pub unsafe fn load_f32(address: u32) -> f32 {
    let value: f32;
    asm!("ld.shared.f32 {}, [{}];", out(reg32) value, in(reg32) address, options(nostack));
    value
}

/// Stores a u32.
///
/// # Safety
/// As [`store_f32`].
#[inline(always)]
pub unsafe fn store_u32(address: u32, value: u32) {
    asm!("st.shared.b32 [{}], {};", in(reg32) address, in(reg32) value, options(nostack));
}

/// Loads a u32.
///
/// # Safety
/// As [`load_f32`].
#[inline(always)]
pub unsafe fn load_u32(address: u32) -> u32 {
    let value: u32;
    asm!("ld.shared.b32 {}, [{}];", out(reg32) value, in(reg32) address, options(nostack));
    value
}

/// Makes this thread's ordinary stores to shared memory visible to the tensor cores and to the copy
/// engine (9.7.13.5, fence.proxy.async). They see them behind the next barrier.
///
/// # Safety
/// This is always sound. It is `unsafe` because the order of what follows rests on it.
#[inline(always)]
pub unsafe fn publish_to_async() {
    asm!("fence.proxy.async.shared::cta;", options(nostack));
}
