//! The kernels of framestride, in Rust, for NVIDIA GPUs.
//!
//! * [`cuda`]: a thin layer over PTX.
//! * [`pack`](mod@pack): norm, RoPE and reordering into packed images.
//! * [`profile`]: attention of sampled rows under every mask, and the choice of each head's mask.
//! * [`attention`]: the sparse attention itself, on [`softmax`] and the generated [`cuda::mma::TileProducts`].
//! * [`shape`]: what `attention_kernels!` states of a spec.
//!
//! The crate is empty unless it is compiled for `nvptx64-nvidia-cuda`.
#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg(target_arch = "nvptx64")]
#![feature(asm_experimental_arch, stmt_expr_attributes)]
#![warn(missing_docs)]
// Every function that touches the device is unsafe as a whole; its contract is in its documentation.
#![allow(unsafe_op_in_unsafe_fn)]

pub mod attention;
pub mod cuda;
pub mod element;
pub mod pack;
pub mod profile;
pub mod shape;
pub mod softmax;

pub use framestride_macros::{attention_kernels, kernel, tile_products};
pub use framestride_shapes as shapes;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Aborts at once: `immediate-abort` leaves nothing to say, and no path of these kernels leads here.
    // SAFETY: ends the kernel.
    unsafe { core::arch::asm!("trap;", options(noreturn)) }
}
