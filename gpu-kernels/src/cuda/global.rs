//! Global memory by 64-bit address (9.7.8.8, ld; 9.7.8.11, st). Loads go through `.nc`: what they
//! read is written by no kernel of the launch.

use core::arch::asm;

/// Loads 16 bytes.
///
/// # Safety
/// `address` is 16-byte aligned and valid, and nobody writes it during the launch.
#[inline(always)]
pub unsafe fn load16(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!(
        "ld.global.nc.v4.b32 {{{}, {}, {}, {}}}, [{}];",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address,
        options(nostack)
    );
    [a, b, c, d]
}

/// Loads 4 bytes, two at a time.
///
/// # Safety
/// `address` is 2-byte aligned and valid for 4 bytes, and nobody writes there during the launch.
#[inline(always)]
pub unsafe fn load4_unaligned(address: u64) -> u32 {
    let pair: u32;
    asm!(
        "{{",
        ".reg .b16 %h<2>;",
        "ld.global.nc.b16 %h0, [{1}];",
        "ld.global.nc.b16 %h1, [{1}+2];",
        "mov.b32 {0}, {{%h0, %h1}};",
        "}}",
        out(reg32) pair, in(reg64) address,
        options(nostack)
    );
    pair
}

/// Loads 16 bytes, two at a time, for tensors whose strides are not multiples of 16 bytes.
///
/// # Safety
/// `address` is 2-byte aligned and valid for 16 bytes, and nobody writes there during the launch.
#[inline(always)]
pub unsafe fn load16_unaligned(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    asm!(
        "{{",
        ".reg .b16 %h<8>;",
        "ld.global.nc.b16 %h0, [{4}];",
        "ld.global.nc.b16 %h1, [{4}+2];",
        "ld.global.nc.b16 %h2, [{4}+4];",
        "ld.global.nc.b16 %h3, [{4}+6];",
        "ld.global.nc.b16 %h4, [{4}+8];",
        "ld.global.nc.b16 %h5, [{4}+10];",
        "ld.global.nc.b16 %h6, [{4}+12];",
        "ld.global.nc.b16 %h7, [{4}+14];",
        "mov.b32 {0}, {{%h0, %h1}};",
        "mov.b32 {1}, {{%h2, %h3}};",
        "mov.b32 {2}, {{%h4, %h5}};",
        "mov.b32 {3}, {{%h6, %h7}};",
        "}}",
        out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address,
        options(nostack)
    );
    [a, b, c, d]
}

/// Loads four f32.
///
/// # Safety
/// As [`load16`].
#[inline(always)]
pub unsafe fn load_f32x4(address: u64) -> [f32; 4] {
    let [a, b, c, d] = load16(address);
    [f32::from_bits(a), f32::from_bits(b), f32::from_bits(c), f32::from_bits(d)]
}

/// Loads eight f32.
///
/// # Safety
/// As [`load16`], of both halves.
#[inline(always)]
pub unsafe fn load_f32x8(address: u64) -> [f32; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (load_f32x4(address), load_f32x4(address + 16));
    [a, b, c, d, e, f, g, h]
}

/// Loads a u32.
///
/// # Safety
/// `address` is 4-byte aligned and valid, and nobody writes it during the launch.
#[inline(always)]
pub unsafe fn load_u32(address: u64) -> u32 {
    let value: u32;
    asm!("ld.global.nc.b32 {}, [{}];", out(reg32) value, in(reg64) address, options(nostack));
    value
}

/// Loads an f32.
///
/// # Safety
/// As [`load_u32`].
#[inline(always)]
pub unsafe fn load_f32(address: u64) -> f32 {
    f32::from_bits(load_u32(address))
}

/// Loads two f32.
///
/// # Safety
/// `address` is 8-byte aligned and valid, and nobody writes it during the launch.
#[inline(always)]
pub unsafe fn load_f32x2(address: u64) -> [f32; 2] {
    let (a, b): (f32, f32);
    asm!("ld.global.nc.v2.f32 {{{}, {}}}, [{}];", out(reg32) a, out(reg32) b, in(reg64) address, options(nostack));
    [a, b]
}

/// Stores 16 bytes.
///
/// # Safety
/// `address` is 16-byte aligned and valid, and no other thread touches it during the launch.
#[inline(always)]
pub unsafe fn store16(address: u64, value: [u32; 4]) {
    asm!(
        "st.global.v4.b32 [{}], {{{}, {}, {}, {}}};",
        in(reg64) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
        options(nostack)
    );
}

/// Stores 8 bytes.
///
/// # Safety
/// `address` is 8-byte aligned and valid, and no other thread touches it during the launch.
#[inline(always)]
pub unsafe fn store8(address: u64, value: [u32; 2]) {
    asm!("st.global.v2.b32 [{}], {{{}, {}}};", in(reg64) address, in(reg32) value[0], in(reg32) value[1], options(nostack));
}

/// Stores 16 bytes, two at a time.
///
/// # Safety
/// `address` is 2-byte aligned and valid for 16 bytes, and no other thread touches them during the
/// launch.
#[inline(always)]
pub unsafe fn store16_unaligned(address: u64, value: [u32; 4]) {
    asm!(
        "{{",
        ".reg .b16 %h<8>;",
        "mov.b32 {{%h0, %h1}}, {1};",
        "mov.b32 {{%h2, %h3}}, {2};",
        "mov.b32 {{%h4, %h5}}, {3};",
        "mov.b32 {{%h6, %h7}}, {4};",
        "st.global.b16 [{0}], %h0;",
        "st.global.b16 [{0}+2], %h1;",
        "st.global.b16 [{0}+4], %h2;",
        "st.global.b16 [{0}+6], %h3;",
        "st.global.b16 [{0}+8], %h4;",
        "st.global.b16 [{0}+10], %h5;",
        "st.global.b16 [{0}+12], %h6;",
        "st.global.b16 [{0}+14], %h7;",
        "}}",
        in(reg64) address, in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
        options(nostack)
    );
}

/// Adds to a u32. Returns what it was (9.7.13.5, atom).
///
/// # Safety
/// `address` is 4-byte aligned and valid. During the launch, others touch it by this function
/// alone.
#[inline(always)]
pub unsafe fn add_u32(address: u64, value: u32) -> u32 {
    let old: u32;
    asm!("atom.global.add.u32 {}, [{}], {};", out(reg32) old, in(reg64) address, in(reg32) value, options(nostack));
    old
}

/// Stores two f32.
///
/// # Safety
/// `address` is 8-byte aligned and valid, and no other thread touches it during the launch.
#[inline(always)]
pub unsafe fn store_f32x2(address: u64, value: [f32; 2]) {
    asm!("st.global.v2.f32 [{}], {{{}, {}}};", in(reg64) address, in(reg32) value[0], in(reg32) value[1], options(nostack));
}

/// Stores an f32.
///
/// # Safety
/// `address` is 4-byte aligned and valid, and no other thread touches it during the launch.
#[inline(always)]
pub unsafe fn store_f32(address: u64, value: f32) {
    asm!("st.global.f32 [{}], {};", in(reg64) address, in(reg32) value, options(nostack));
}

/// Stores a u32.
///
/// # Safety
/// As [`store_f32`].
#[inline(always)]
pub unsafe fn store_u32(address: u64, value: u32) {
    asm!("st.global.b32 [{}], {};", in(reg64) address, in(reg32) value, options(nostack));
}
