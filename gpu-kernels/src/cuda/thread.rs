//! Where this thread stands (10, Special Registers), what a whole warpgroup does to its registers, and
//! what ptxas must not do to a loop.

use core::arch::asm;

macro_rules! special_register {
    ($($(#[$doc:meta])* $name:ident = $register:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            let value: u32;
            // SAFETY: this reads a special register, which every thread has.
            unsafe { asm!(concat!("mov.u32 {}, ", $register, ";"), out(reg32) value, options(pure, nomem, nostack)) };
            value
        }
    )*};
}

special_register! {
    /// Number of the thread in the block.
    index = "%tid.x";
    /// Number of the block in the grid, x.
    block_x = "%ctaid.x";
    /// Number of the block in the grid, y.
    block_y = "%ctaid.y";
    /// Number of the block in the grid, z.
    block_z = "%ctaid.z";
    /// Blocks of the grid in x.
    blocks_x = "%nctaid.x";
    /// Number of the lane in the warp.
    lane = "%laneid";
}

/// Number of the warp in the block. All of its lanes have the same value.
#[inline(always)]
pub fn warp() -> u32 {
    // SAFETY: every lane of the warp reads lane 0. They are converged at the start of a kernel,
    // where this is called.
    unsafe { super::warp::broadcast(index() / 32, 0) }
}

/// Waits until every thread of the block is here (9.7.13.1, bar).
///
/// # Safety
/// Every thread of the block comes here.
#[inline(always)]
pub unsafe fn sync_block() {
    asm!("bar.sync 0;", options(nostack));
}

/// Whether `condition` holds in any thread of the block (9.7.13.1, bar.red).
///
/// # Safety
/// Every thread of the block comes here.
#[inline(always)]
pub unsafe fn any_of_block(condition: bool) -> bool {
    let out: u32;
    asm!(
        "{{ .reg .pred %any; setp.ne.u32 %any, {1}, 0; bar.red.or.pred %any, 0, %any; vote.sync.any.pred %any, %any, -1; selp.u32 {0}, 1, 0, %any; }}",
        out(reg32) out, in(reg32) condition as u32, options(nostack)
    );
    out != 0
}

/// Waits until both of two consumer warpgroups are here. Barrier 7 is theirs.
///
/// # Safety
/// Both whole warpgroups come here, and nobody else.
#[inline(always)]
pub unsafe fn sync_two_warpgroups() {
    asm!("bar.sync 7, 256;", options(nostack));
}

/// Whether `condition` holds in any thread of a warpgroup (9.7.13.1, bar.red). It has barrier 1 +
/// `warpgroup` for itself.
///
/// # Safety
/// The whole warpgroup comes here. `warpgroup` is its number in the block.
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
/// Every warp of the warpgroup comes here, once. The kernel has launch bounds.
#[inline(always)]
pub unsafe fn release_registers<const KEEP: u32>() {
    asm!("setmaxnreg.dec.sync.aligned.u32 {};", const KEEP, options(nostack));
}

/// Takes registers that others gave back, and waits until there are enough.
///
/// # Safety
/// As for [`release_registers`]. The register file has room for what all warpgroups hold.
#[inline(always)]
pub unsafe fn take_registers<const WANT: u32>() {
    asm!("setmaxnreg.inc.sync.aligned.u32 {};", const WANT, options(nostack));
}

/// Keeps ptxas from unrolling the loop whose body begins with this (12.1, nounroll).
#[inline(always)]
pub fn keep_rolled() {
    // SAFETY: a pragma is nothing that a thread executes.
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack)) };
}
