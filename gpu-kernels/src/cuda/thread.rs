//! Where this thread stands (10, Special Registers), and what a whole warpgroup does to its registers.

use core::arch::asm;

macro_rules! special_register {
    ($($(#[$doc:meta])* $name:ident = $register:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // SAFETY: reads a special register, which every thread has.
            unsafe { asm!(concat!("mov.u32 {}, ", $register, ";"), out(reg32) value, options(pure, nomem, nostack)) };
            value
        }
    )*};
}

special_register! {
    /// Thread of the block.
    index = "%tid.x";
    /// Block of the grid, x.
    block_x = "%ctaid.x";
    /// Block of the grid, y.
    block_y = "%ctaid.y";
    /// Block of the grid, z.
    block_z = "%ctaid.z";
    /// Blocks of the grid in x.
    blocks_x = "%nctaid.x";
    /// Lane of the warp.
    lane = "%laneid";
}

/// Warp of the block, the same value in all of its lanes.
#[inline(always)]
pub fn warp() -> u32 {
    // SAFETY: every lane of the warp reads lane 0, and is converged at the start of a kernel, where this is called.
    unsafe { super::warp::broadcast(index() / 32, 0) }
}

/// Waits until every thread of the block is here (9.7.13.1, bar).
///
/// # Safety
/// Every thread of the block must come here.
#[inline(always)]
pub unsafe fn sync_block() {
    asm!("bar.sync 0;", options(nostack));
}

/// Waits until both of two consumer warpgroups are here; barrier 7 is theirs.
///
/// # Safety
/// Both whole warpgroups come here, and nobody else.
#[inline(always)]
pub unsafe fn sync_two_warpgroups() {
    asm!("bar.sync 7, 256;", options(nostack));
}

/// Whether `condition` holds in any thread of a warpgroup (9.7.13.1, bar.red); barrier 1 + `warpgroup` is its own.
///
/// # Safety
/// The whole warpgroup comes here; `warpgroup` is its number in the block.
#[inline(always)]
pub unsafe fn any_of_warpgroup(condition: bool, warpgroup: u32) -> bool {
    let out: u32;
    asm!(
        "{{ .reg .pred %any; setp.ne.u32 %any, {1}, 0; bar.red.or.pred %any, {2}, 128, %any; vote.sync.any.pred %any, %any, -1; selp.u32 {0}, 1, 0, %any; }}",
        out(reg32) out, in(reg32) condition as u32, in(reg32) 1 + warpgroup, options(nostack)
    );
    out != 0
}

/// Gives registers back so that other warpgroups may take them (9.7.19.5, setmaxnreg).
///
/// # Safety
/// Every warp of the warpgroup comes here, once; the kernel has launch bounds.
#[inline(always)]
pub unsafe fn release_registers<const KEEP: u32>() {
    asm!("setmaxnreg.dec.sync.aligned.u32 {};", const KEEP, options(nostack));
}

/// Takes registers that others gave back; waits until there are enough.
///
/// # Safety
/// As [`release_registers`]; what all warpgroups hold fits the register file.
#[inline(always)]
pub unsafe fn take_registers<const WANT: u32>() {
    asm!("setmaxnreg.inc.sync.aligned.u32 {};", const WANT, options(nostack));
}
